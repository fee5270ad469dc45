#!/usr/bin/env python3
"""What tests/architecture/arrows.py says about small trees: that it can fail, and on what."""

import pathlib
import tempfile
import unittest

import arrows

FILES = {
    "include/flash_mla/engine.h": "",
    "include/flash_mla/decode.h": "",
    "src/base/element.h": "",
    "src/kernels/rows/sm90/rows.h": "",
    "src/kernels/rows/sm90/row_math.cuh": '#include "base/element.h"',
    "src/model/model.h": '#include "kernels/rows/sm90/rows.h"\n#include "flash_mla/decode.h"',
    "src/server/server.h": '#include "flash_mla/engine.h"',
}


class Arrows(unittest.TestCase):
    def check(self, files, exceptions=()):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for name, text in {**FILES, **files}.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text, encoding="utf-8")
            return arrows.check(root, set(exceptions))

    def test_allowed_arrows_are_silent(self):
        self.assertEqual(self.check({}), [])

    def test_a_wrong_arrow_is_named_by_file_and_line(self):
        wrong = self.check({"src/kernels/rows/cpu/rows.cpp": '// Rows.\n#include "model/model.h"'})
        self.assertEqual(len(wrong), 1)
        self.assertTrue(wrong[0].startswith('src/kernels/rows/cpu/rows.cpp:2: #include "model/model.h"'), wrong)

    def test_the_model_sees_no_device_code(self):
        wrong = self.check({"src/model/cuda.cpp": '#include "kernels/rows/sm90/row_math.cuh"'})
        self.assertIn("device code", wrong[0])

    def test_the_server_sees_the_engine_alone(self):
        wrong = self.check({"src/server/api.cpp": '#include "flash_mla/decode.h"'})
        self.assertIn("flash_mla/engine.h", wrong[0])

    def test_relative_includes_count(self):
        self.assertEqual(len(self.check({"src/base/up.h": '#include "../model/model.h"'})), 1)

    def test_a_missing_file_and_a_new_room_are_named(self):
        self.assertIn("no such file", self.check({"src/base/a.h": '#include "base/none.h"'})[0])
        self.assertIn("has no arrows", self.check({"src/attic/a.h": ""})[0])

    def test_an_exception_silences_until_it_is_not_needed(self):
        pair = ("src/base/a.h", "model/model.h")
        self.assertEqual(self.check({pair[0]: f'#include "{pair[1]}"'}, [pair]), [])
        self.assertIn("take it out", self.check({}, [pair])[0])


if __name__ == "__main__":
    unittest.main()
