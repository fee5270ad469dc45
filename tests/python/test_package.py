import flash_mla_kernels._C


def test_the_extension_needs_no_highway_at_run_time():
    with open(flash_mla_kernels._C.__file__, "rb") as f:
        assert b"libhwy" not in f.read()
