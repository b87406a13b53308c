"""The command `bench` on a tiny model: its document, its table, its errors. No figure is held to be fast."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cli import bench, measure
from cli.builder import build, prepare
from cli.main import main
from cli.measure import Machine, fill_cache, measure_decode, measure_prefill, prefill_flops
from config.settings import BuildSettings, Setting
from tests.tiny_checkpoint import CONTEXT, write_tiny_checkpoint

ON_CPU = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The machine itself is measured by model/device.py, whose tests measure it; here that is a second a test."""
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "measure_machine", lambda device, dtype: Machine(40.0, 20.0, 0.5))
    monkeypatch.setattr(measure, "BLOCK_STEPS", (2, 4))


def built(directory, **changes):
    settings = BuildSettings(model=str(directory), device=Setting("cpu"), dtype=Setting("fp32"), **changes)
    return build(prepare(settings))


def refusal(capsys, *argv):
    """The one line that `bench` refuses `argv` with."""
    assert main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "error: " in line]
    assert captured.err.splitlines()[-1:] == lines
    return lines[0]


def test_the_document_has_every_key_and_figures_that_agree(tiny, capsys):
    argv = ["--prefill-tokens", "16,9", "--context", "8,30", "--batch", "1,3", "--repeats", "2", "--json"]
    assert main(["bench", str(tiny), *ON_CPU, *argv]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["machine"].items() >= {"device": "cpu", "copy_gb_s": 40.0, "read_gb_s": 20.0}.items()
    assert document["settings"].items() >= {"model": "tiny", "dtype": "fp32", "compile": False, "repeats": 2}.items()
    assert document["load_s"] > 0
    assert document["quantize_s"] == 0
    assert document["compile_s"] == 0
    assert document["compile_warm_s"] is None
    assert document["peak_memory_bytes"] > 0
    assert [row["tokens"] for row in document["prefill"]] == [16, 9]
    assert all(row["tok_s"] > 0 for row in document["prefill"])
    assert [(row["batch"], row["context"]) for row in document["decode"]] == [(1, 8), (1, 30), (3, 8), (3, 30)]
    weight_bytes = built(tiny).ledger.weight_bytes_per_token
    for row in document["decode"]:
        assert math.isclose(row["weight_gb_s"], weight_bytes * row["tok_s"] / row["batch"] / 1e9)
        assert math.isclose(row["bandwidth_share"], row["weight_gb_s"] / 20)


def test_a_quantized_model_is_measured_with_the_weights_that_it_has(tiny, capsys):
    argv = ["--prefill-tokens", "8", "--context", "8", "--repeats", "1", "--json", "--quantize", "cpu-small"]
    assert main(["bench", str(tiny), *ON_CPU, *argv]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["quantize_s"] > 0
    assert set(document["settings"]["quantize"]) == {"linear:int4", "linear:int8", "embedding"}
    row = document["decode"][0]
    assert row["weight_gb_s"] / row["tok_s"] * 1e9 < 0.6 * built(tiny).ledger.weight_bytes_per_token


def test_random_weights_need_no_file_and_the_defaults_follow_the_context(tiny, capsys, tmp_path):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "config.json").write_text((tiny / "config.json").read_text())
    argv = ["--random-weights", str(tmp_path / "shapes"), *ON_CPU, "--repeats", "1", "--json"]
    assert main(["bench", *argv]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["random_weights"] is True
    assert document["settings"]["max_seq_len"] == CONTEXT
    assert [row["tokens"] for row in document["prefill"]] == [CONTEXT // 2]
    assert [row["context"] for row in document["decode"]] == [CONTEXT // 2]


def test_people_get_a_table_on_stdout(tiny, capsys):
    argv = ["--prefill-tokens", "16", "--context", "8", "--batch", "1,2", "--repeats", "1"]
    assert main(["bench", str(tiny), *ON_CPU, *argv]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    labels = [" ".join(line[:2]) for line in lines if line]
    assert labels[:4] == ["machine " + lines[0][1], "memory copies", "matrices fp32:", "load " + lines[3][1]]
    assert [line[:4] for line in lines if line[:1] == ["memory"]] == [["memory", "copies", "40.0", "GB/s,"]]
    rows = {" ".join(line[:2]): line for line in lines if line}
    assert rows["16 tokens"][3] == "tok/s"
    assert rows["after 8"][3] == "tok/s"
    assert "batch" in rows["after 8,"]
    assert "peak memory" in rows


def test_a_gpu_is_held_against_copying_too(tiny, capsys):
    from cli.bench_report import Report

    report = Report(prepare(BuildSettings(str(tiny), Setting("cpu"), Setting("fp32"))), 128, 3, show=True)
    report.device = torch.device("cuda")
    report.machine = Machine(copy_gb_s=4000.0, read_gb_s=5000.0, matrix_tflop_s=700.0)
    report.decoded(measure.DecodeRate(context=128, batch=1, step_s=0.005, weight_bytes=15_000_000_000))
    assert capsys.readouterr().out.splitlines()[-1].split()[-2:] == ["60%", "75%"]


@pytest.mark.slow  # compiles a step: ten seconds and more
def test_compiling_is_measured_cold_and_warm(tiny, capsys, tmp_path):
    argv = ["--compile", "--prefill-tokens", "16", "--context", "8", "--repeats", "1", "--json"]
    assert main(["bench", str(tiny), *ON_CPU, *argv]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert 0 < document["compile_warm_s"] < document["compile_s"]
    assert captured.err.count("; compiling, which") == 1
    assert captured.err.count(": compiled before, loaded") == 1
    assert list((tmp_path / "cache").rglob("*.pt2")) == []  # what was measured cold is kept nowhere


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["default", "--random-weights", "llama3.1-8b"], "contradict each other"),
        (["--random-weights", "llama3.1-8c"], "llama3.1-8b"),
        (["--prefill-tokens", "16,x"], "'x'"),
        (["--context", "0"], "whole number from 1"),
        (["--context", ""], "whole number from 1"),
        (["--batch", "4096"], "to 1024"),
        (["--batch", ",".join(["1"] * 65)], "at most 64"),
        (["--repeats", "0"], "whole number from 1"),
        (["--prompt", "x"], "unknown option --prompt"),
    ],
)
def test_what_is_wrong_in_itself_is_refused(argv, says, capsys):
    assert says in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prefill-tokens", "128"], "--prefill-tokens 128: tiny runs with a context of 128 here"),
        (["--context", "127"], "--context 127: tiny runs"),
        (["--max-seq-len", "64", "--context", "63"], "or raise --max-seq-len"),
        (["--max-seq-len", "129"], "128 positions"),
        (["--max-seq-len", "4"], "too short to measure"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tiny, argv, says, capsys):
    assert says in refusal(capsys, str(tiny), *ON_CPU, *argv)


def test_random_weights_larger_than_the_memory_are_refused_before_they_are_made(capsys, monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda device: 10**9)
    line = refusal(capsys, "--random-weights", "llama3.1-70b", "--device", "cpu", "--dtype", "bf16")
    assert "needs 141 GB for its weights" in line
    assert "1 GB free" in line


def test_memory_that_runs_out_is_one_line(tiny, capsys, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(measure, "measure_prefill", fails)
    argv = [str(tiny), *ON_CPU, "--json"]
    assert "does not fit in the memory" in refusal(capsys, *argv)


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_ctrl_c_leaves_the_rows_that_are_there(tiny, capsys, monkeypatch, json_flag):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_decode", interrupted)
    assert main(["bench", str(tiny), *ON_CPU, "--prefill-tokens", "16", "--repeats", "1", *json_flag]) == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("torchchat: interrupted")
    assert ("16 tokens" in captured.out) is not bool(json_flag)
    assert (captured.out == "") is bool(json_flag)


def test_what_the_cold_cache_changes_is_changed_back(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with bench._empty_cache() as directory:
        assert list(directory.iterdir()) == []
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(directory / "inductor")
        assert os.environ["TRITON_CACHE_DIR"] == str(directory / "triton")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert "TRITON_CACHE_DIR" not in os.environ
    assert not directory.exists()


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_is_measured_at_the_depth_that_is_said(tiny, batch):
    engine = built(tiny, max_num_seqs=batch).engine
    fill_cache(engine.cache)
    inner, depths = engine.decode_fn, []

    def watched(model, cache, state, slots_B, plan):
        depths.append(state.positions[:batch].tolist())
        return inner(model, cache, state, slots_B, plan)

    engine.decode_fn = watched
    runs = []
    row = measure_decode(engine, 40, batch, 2, lambda: runs.append(len(depths)))
    assert (row.context, row.batch, len(runs)) == (40, batch, 3)
    starts = [0, *runs[:-1]]
    assert [depths[i] for i in starts] == [[40] * batch] * 3
    assert depths[1] == [41] * batch
    assert not engine.has_unfinished


def test_a_measured_prompt_is_read_whole(tiny):
    engine = built(tiny).engine
    row = measure_prefill(engine, 20, 1000, 3, lambda: None)
    assert engine.ledger.prefill_tokens == 4 * 20
    assert row.tok_s == 20 / row.seconds
    assert row.tflop_s == 1000 / row.seconds / 1e12


def test_the_operations_of_a_prefill_are_those_of_its_matrix_products(tiny):
    one = built(tiny)
    ids, zero = torch.arange(20)[None], torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        one.model(ids, zero, one.engine.cache, zero, 20, zero + 19)
    products = sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    config = one.prepared.config
    pairs = 20 * 21 // 2
    attention = len(config.layers) * 4 * config.num_attention_heads * config.head_dim * pairs
    assert prefill_flops(one.model, 20) == products + attention


def test_a_window_is_counted_as_what_it_sees(tiny):
    model = built(tiny).model
    whole = prefill_flops(model, 20)
    layers = tuple(replace(layer, attention="sliding") for layer in model.config.layers)
    model.config = replace(model.config, layers=layers, sliding_window=6)
    hidden_pairs = sum(max(0, position + 1 - 6) for position in range(20))
    heads = model.config.num_attention_heads * model.config.head_dim
    assert whole - prefill_flops(model, 20) == len(layers) * 4 * heads * hidden_pairs
