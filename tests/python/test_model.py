"""The forward pass against transformers' own models, and against itself in every way of cutting the work."""

import functools

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import (
    CONFIGS,
    edit_config,
    edit_weights,
    expected_greedy,
    expected_logits,
    random_tokens,
    write_checkpoint,
)

from flash_mla_kernels.model import PAGE_SIZE, Model

TOLERANCE = 2e-4  # on float32 logits of order 1


class Runner:
    """Sequences with shuffled pages over one model."""

    def __init__(self, model, num_pages=64):
        model.allocate_cache(num_pages)
        self.model = model
        self.free = np.random.default_rng(7).permutation(num_pages).tolist()
        self.pages, self.lengths = [], []

    def add(self):
        self.pages.append([])
        self.lengths.append(0)
        return len(self.lengths) - 1

    def step(self, work, batch_invariant=False):
        """``work``: (sequence, new tokens) pairs; returns each one's logits (new tokens, vocab_size)."""
        tokens, starts, lengths = [], [0], []
        for seq, new in work:
            tokens += new
            starts.append(len(tokens))
            self.lengths[seq] += len(new)
            lengths.append(self.lengths[seq])
            while len(self.pages[seq]) * PAGE_SIZE < self.lengths[seq]:
                self.pages[seq].append(self.free.pop())
        width = max(len(self.pages[seq]) for seq, _ in work) + 1
        table = np.full((len(work), width), -1, np.int32)
        for row, (seq, _) in zip(table, work):
            row[: len(self.pages[seq])] = self.pages[seq]
        logits = self.model.forward(tokens, starts, lengths, table, batch_invariant=batch_invariant)
        return np.split(logits, starts[1:-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def get(name):
        directory = tmp_path_factory.mktemp(name)
        oracle = write_checkpoint(name, directory)
        return directory, oracle, Model(directory, precision="float32", num_threads=2)

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_prefill(checkpoint, name):
    _, oracle, model = checkpoint(name)
    tokens = random_tokens(150)
    runner = Runner(model)
    (logits,) = runner.step([(runner.add(), tokens)])
    expected = expected_logits(oracle, tokens)
    assert np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [[40, 60, 50], [64, 64, 22], [17, 16, 100, 3, 14], [1] * 70 + [80]], ids=str)
def test_chunks(checkpoint, name, chunks):
    _, oracle, model = checkpoint(name)
    tokens = random_tokens(sum(chunks), seed=1)
    runner = Runner(model)
    seq, at, logits = runner.add(), 0, []
    for count in chunks:
        logits += runner.step([(seq, tokens[at : at + count])])
        at += count
    assert np.abs(np.concatenate(logits) - expected_logits(oracle, tokens)).max() < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_long_prompt_spans_several_key_tiles(checkpoint, name):
    _, oracle, model = checkpoint(name)
    tokens = random_tokens(511, seed=2)
    runner = Runner(model)
    seq = runner.add()
    first = runner.step([(seq, tokens[:300])])
    second = runner.step([(seq, tokens[300:510])])
    third = runner.step([(seq, tokens[510:])])
    assert np.abs(np.concatenate(first + second + third) - expected_logits(oracle, tokens)).max() < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_continuation(checkpoint, name):
    _, oracle, model = checkpoint(name)
    prompt = random_tokens(30, seed=3)
    runner = Runner(model)
    seq, new, out = runner.add(), prompt, []
    for _ in range(64):
        (logits,) = runner.step([(seq, new)])
        new = [int(logits[-1].argmax())]
        out += new
    assert out == expected_greedy(oracle, prompt, 64)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_some_rows_are_wanted(checkpoint, name):
    """None of a chunk amid a prompt, the last of its end, one amid another's."""
    _, oracle, model = checkpoint(name)
    model.allocate_cache(8)
    first, second = random_tokens(200, seed=4), random_tokens(90, seed=5)
    pages = [[3, 1, 6, 0], [2, 5, -1, -1]]
    nothing = model.forward(first[:130], [0, 130], [130], pages[:1], [])
    assert nothing.shape[0] == 0
    rows = [159, 69, 40, 69]  # of 70 tokens of the first and 90 of the second; in any order, also twice
    logits = model.forward(first[130:] + second, [0, 70, 160], [200, 90], pages, rows)
    expected = [expected_logits(oracle, second)[89], expected_logits(oracle, first)[199]]
    expected += [expected_logits(oracle, first)[170], expected[1]]
    assert np.abs(logits - np.stack(expected)).max() < TOLERANCE


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_8_bits(checkpoint, name, precision):
    """Logits stay close to those of the checkpoint, and are the same whole and step by step, alone and in a batch."""
    directory, oracle, _ = checkpoint(name)
    try:
        model = Model(directory, precision=precision, quantize="int8", num_threads=2)
    except NotImplementedError as error:
        assert precision == "bfloat16" and "AVX-512" in str(error)
        return
    tokens = random_tokens(100, seed=6)
    runner = Runner(model)
    (logits,) = runner.step([(runner.add(), tokens)])
    expected = expected_logits(oracle, tokens)
    # The median token's error: random layers send one or the other to another expert for a slight change.
    error = np.median(np.sqrt(np.square(logits - expected).mean(axis=1))) / expected.std()
    # Sparse attention looks at other tokens, too.
    chooses = 0.04 if hasattr(oracle.config, "index_topk") else 0
    assert 0.005 < error < (0.04 if precision == "float32" else 0.05) + chooses
    if precision == "float32":
        seq, other = runner.add(), runner.add()
        steps = runner.step([(seq, tokens[:40])]) + runner.step([(seq, tokens[40:99])])
        steps += runner.step([(other, random_tokens(33, seed=7)), (seq, tokens[99:])])[1:]
        assert np.abs(np.concatenate(steps) - logits).max() < TOLERANCE


def mixed_work(runner):
    """Steps with prefill chunks of several sizes beside decodes; returns a list of (sequence, tokens) lists."""
    lengths = [(70, 1, 1, 1), (5, 1, 40, 1), (130, 33, 1, 17), (1, 1, 1, 1), (16, 17, 3, 1)]
    seqs = [runner.add() for _ in lengths]
    return [
        [(s, random_tokens(lengths[s][step], seed=100 * s + step)) for s in seqs[: 3 + step]]
        for step in range(4)
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_batch_invariant_mode_is_bit_exact(checkpoint, name, precision):
    directory, _, model = checkpoint(name)
    if precision != "float32":
        try:
            model = Model(directory, precision=precision, num_threads=2)
        except NotImplementedError as error:
            assert "AVX-512" in str(error)
            return
    together = Runner(model)
    work = mixed_work(together)
    batched = [together.step(step, batch_invariant=True) for step in work]
    for s in range(5):
        alone = Runner(model)
        for _ in range(5):
            alone.add()
        for step, logits in zip(work, batched):
            for (seq, new), expected in zip(step, logits):
                if seq == s:
                    (out,) = alone.step([(seq, new)], batch_invariant=True)
                    np.testing.assert_array_equal(out.view(np.int32), expected.view(np.int32))
    # However a prompt is cut: in one piece, in chunks on both sides of the absorbed form's limit, token by token.
    tokens = random_tokens(150, seed=11)
    runner = Runner(together.model)
    (whole,) = runner.step([(runner.add(), tokens)], batch_invariant=True)
    for chunk in (1, 7, 16, 17, 64, 100):
        seq = runner.add()
        pieces = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
        cut = np.concatenate([runner.step([(seq, piece)], batch_invariant=True)[0] for piece in pieces])
        np.testing.assert_array_equal(cut.view(np.int32), whole.view(np.int32))


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_is_one_at_a_time(checkpoint, name):
    _, oracle, model = checkpoint(name)
    runner = Runner(model)
    text, logits = {}, {}
    for step in mixed_work(runner):
        for (seq, new), out in zip(step, runner.step(step)):
            text[seq] = text.get(seq, []) + new
            logits.setdefault(seq, []).append(out)
    for seq, tokens in text.items():
        assert np.abs(np.concatenate(logits[seq]) - expected_logits(oracle, tokens)).max() < TOLERANCE


def test_same_bits_run_to_run(checkpoint):
    _, _, model = checkpoint("v3")
    runs = []
    for _ in range(2):
        runner = Runner(model)
        runs.append([np.concatenate(runner.step(step)) for step in mixed_work(runner)])
    for a, b in zip(*runs):
        np.testing.assert_array_equal(a, b)


def test_logit_rows(checkpoint):
    _, _, model = checkpoint("v3")
    model.allocate_cache(4)
    tokens = random_tokens(30) + random_tokens(3, seed=1)
    arguments = (tokens, [0, 30, 33], [30, 33 - 30], [[2], [0]])
    every = model.forward(*arguments)
    some = model.forward(*arguments, logit_rows=[32, 0, 29])
    assert np.abs(some - every[[32, 0, 29]]).max() < 1e-5
    assert model.forward(*arguments, logit_rows=[]).shape == (0, model.vocab_size)


def test_copied_page_holds_the_same_tokens(checkpoint):
    _, _, model = checkpoint("v3")
    model.allocate_cache(4)
    tokens = random_tokens(41)
    model.forward(tokens[:40], [0, 40], [40], [[1]], logit_rows=[])
    model.copy_page(1, 3)
    a = model.forward(tokens[40:], [0, 1], [41], [[1]])
    b = model.forward(tokens[40:], [0, 1], [41], [[3]])
    np.testing.assert_array_equal(a, b)


def test_bytes_per_page(checkpoint):
    _, oracle, model = checkpoint("v3")
    c = oracle.config
    assert model.bytes_per_page == c.num_hidden_layers * PAGE_SIZE * (c.kv_lora_rank + c.qk_rope_head_dim) * 4


@pytest.mark.parametrize("name", ["v2", "v3", "v3-full-heads"])
def test_bfloat16(checkpoint, name):
    directory, oracle, _ = checkpoint(name)
    try:
        model = Model(directory, precision="bfloat16", num_threads=2)
    except NotImplementedError as error:
        assert "AVX-512" in str(error)
        return
    tokens = random_tokens(120, seed=5)
    runner = Runner(model)
    seq = runner.add()
    logits = np.concatenate(runner.step([(seq, tokens[:100])]) + [runner.step([(seq, [t])])[0] for t in tokens[100:]])
    expected = expected_logits(oracle, tokens)
    # A near-tie in the router sends single tokens elsewhere, so the typical token is what is held to account.
    error = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(error) < 0.03


def quantize(tensors, block):
    """Block-scaled FP8 of every two-dimensional projection, as DeepSeek-V3 is published; returns what it means."""
    meant = {}
    for name in list(tensors):
        weight = tensors[name]
        if weight.ndim != 2 or "_proj" not in name:
            continue
        rows, columns = weight.shape
        grid = (-(-rows // block), -(-columns // block))
        padded = np.zeros((grid[0] * block, grid[1] * block), np.float32)
        padded[:rows, :columns] = weight.float().numpy()
        blocks = padded.reshape(grid[0], block, grid[1], block)
        scale = np.maximum(np.abs(blocks).max(axis=(1, 3)) / 448, 1e-12).astype(np.float32)
        small = (blocks / scale[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
        value = (small.astype(np.float32) * scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
        meant[name] = torch.tensor(value)
        bits = small.view(np.uint8).reshape(padded.shape)[:rows, :columns].copy()
        tensors[name] = torch.tensor(bits).view(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.tensor(scale)
    return meant


@pytest.mark.parametrize("block", [128, 16])
def test_block_scaled_fp8(tmp_path, block):
    oracle = write_checkpoint("v3", tmp_path)
    meant = {}
    edit_weights(tmp_path, lambda tensors: meant.update(quantize(tensors, block)))
    edit_config(
        tmp_path,
        quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]},
    )
    assert any("experts" in name for name in meant) and any("kv_b" in name for name in meant)
    plain = tmp_path / "plain"
    oracle.save_pretrained(plain)
    edit_weights(plain, lambda tensors: tensors.update(meant))
    reference = type(oracle).from_pretrained(plain, dtype=torch.float32).eval()

    tokens = random_tokens(60)
    runner = Runner(Model(tmp_path, precision="float32"))
    (logits,) = runner.step([(runner.add(), tokens)])
    assert np.abs(logits - expected_logits(reference, tokens)).max() < TOLERANCE


# What is wrong with a step, and what the message must name.
BAD_STEPS = {
    "token too large": (dict(token_ids=[160]), r"token_ids\[0\] is 160"),
    "token negative": (dict(token_ids=[-1]), r"token_ids\[0\] is -1"),
    "page too large": (dict(block_table=[[4]]), r"block_table\[0\]\[0\] is 4"),
    "page negative": (dict(block_table=[[-1]]), r"block_table\[0\]\[0\] is -1"),
    "position": (dict(seq_lens=[513], block_table=[list(range(4)) * 3]), r"seq_lens\[0\] is 513.*512"),
    "no pages": (dict(seq_lens=[65]), r"max_blocks is 1, expected >= 2"),
    "length below new tokens": (dict(seq_lens=[0]), r"seq_lens\[0\] is 0"),
    "starts not from zero": (dict(query_starts=[1, 1]), r"query_starts\[0\] is 1"),
    "starts past the tokens": (dict(query_starts=[0, 2]), r"query_starts\[1\] is 2"),
    "starts decrease": (
        dict(query_starts=[0, 2, 1], seq_lens=[2, 2], block_table=[[0], [1]]),
        r"query_starts\[2\] is 1",
    ),
    "too few starts": (dict(query_starts=[0]), r"size of query_starts is 1"),
    "table rows": (dict(block_table=[[0], [1]]), r"size of block_table is 2"),
    "logit row": (dict(logit_rows=[1]), r"logit_rows\[0\] is 1"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_step(checkpoint, case):
    _, _, model = checkpoint("v3")
    model.allocate_cache(4)
    changes, message = BAD_STEPS[case]
    step = dict(token_ids=[3], query_starts=[0, 1], seq_lens=[1], block_table=[[0]], logit_rows=[0])
    good = model.forward(**step)
    with pytest.raises(ValueError, match=message):
        model.forward(**{**step, **changes})
    np.testing.assert_array_equal(model.forward(**step), good)


def test_copy_page_out_of_range(checkpoint):
    _, _, model = checkpoint("v3")
    model.allocate_cache(4)
    with pytest.raises(ValueError, match="target is 4"):
        model.copy_page(0, 4)


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.mlp.experts.5.down_proj.weight",
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.norm.weight",
    ],
)
def test_broken_tensors(tmp_path, tensor):
    write_checkpoint("v3", tmp_path)
    original = {}

    def poison(tensors):
        original.update(tensors)
        tensors[tensor] = tensors[tensor].clone()
        tensors[tensor].view(-1)[3] = float("nan")

    edit_weights(tmp_path, poison)
    with pytest.raises(ValueError, match=f"{tensor}.*nan"):
        Model(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop(tensor))
    with pytest.raises(ValueError, match=tensor):
        Model(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({tensor: original[tensor][..., 1:].contiguous()}))
    with pytest.raises(ValueError, match=tensor):
        Model(tmp_path)


def test_unsupported_options(tmp_path):
    write_checkpoint("v3", tmp_path)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        Model(tmp_path, precision="int8")
    with pytest.raises(ValueError, match="quantize is 'int4'"):
        Model(tmp_path, quantize="int4")
    with pytest.raises(ValueError, match="num_threads is -1"):
        Model(tmp_path, num_threads=-1)
    edit_config(tmp_path, hidden_act="gelu")
    with pytest.raises(NotImplementedError, match="hidden_act"):
        Model(tmp_path)
