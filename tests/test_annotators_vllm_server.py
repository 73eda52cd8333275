"""The endpoint judge against a real vLLM server, whose verdicts must be those of a forward pass of transformers."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from annotator_fixtures import compared, job, judge_folder, made
from test_annotators_judges import TEMPLATE, naive

from align_loop.annotators.api import ApiJudge
from align_loop.annotators.judging import fill
from align_loop.engines.endpoint import Endpoint
from align_loop.errors import UserError

pytestmark = pytest.mark.full
pytest.importorskip("vllm")
START = 240  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(url, model folder) of ``vllm serve`` on a tiny judge, with a key."""
    folder = tmp_path_factory.mktemp("served")
    model = judge_folder(folder / "judge", seed=3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", str(model), "--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port)]
    options += ["--dtype", "float32", "--max-model-len", "256", "--block-size", "32", "--max-num-seqs", "8"]
    options += ["--enforce-eager"]
    mine = {"VLLM_API_KEY": "k-of-the-test", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | mine | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        wait(process, port, folder / "log")
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait(process, port, log):
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.mark.timeout(START + 60)
def test_a_real_server_judges_as_the_model_does(server, tmp_path, monkeypatch):
    url, model = server
    monkeypatch.setenv("SERVED_KEY", "k-of-the-test")
    prompts, answers = made()
    verdict = {"allowed_token_ids": [60, 61]}  # A and B: this model knows nothing of verdicts
    endpoint = Endpoint(
        url, "judge", "SERVED_KEY", max_tokens=1, extra=verdict, cache_dir=str(tmp_path / "cache"),
        price_in=1.0, price_out=1.0,
    )  # fmt: skip
    work = job(tmp_path, (prompts, answers))
    got = ApiJudge(endpoint, template=TEMPLATE).annotate(work)
    found, question = compared(got), {p["prompt_id"]: p["messages"][0]["content"] for p in prompts}
    by_id = {row["sample_id"]: row for row in answers}
    assert len(got.pairwise) == 12 and len(set(found.values())) > 1
    for (a, b), p in found.items():
        texts = [
            fill(TEMPLATE, prompt=question[by_id[a]["prompt_id"]], first=by_id[x]["text"], second=by_id[y]["text"])
            for x, y in ((a, b), (b, a))
        ]
        one, two = (naive(model, text, ("A", "B")) for text in texts)
        assert p == (float(one > 0.5) + float(two < 0.5)) / 2
    assert work.context.report["rows"]["comparisons"] == {"in": 12, "out": 12, "dropped": {}}
    assert work.context.report["facts"]["cost"] == pytest.approx(work.context.report["tokens"] / 1e6)
    again = job(tmp_path, (prompts, answers))
    ApiJudge(endpoint, template=TEMPLATE).annotate(again)
    assert again.context.report["facts"]["replies"] == {"sent": 0, "from the cache": 24}


@pytest.mark.timeout(START + 60)
def test_a_real_server_refuses(server, tmp_path, monkeypatch):
    url, _ = server
    monkeypatch.setenv("SERVED_KEY", "wrong")
    with pytest.raises(UserError, match="HTTP 401"):
        Endpoint(url, "judge", "SERVED_KEY", cache_dir=str(tmp_path)).ask([[{"role": "user", "content": "w20"}]])
    monkeypatch.setenv("SERVED_KEY", "k-of-the-test")
    long, short = " ".join(["w20"] * 400), "w20 w21"
    asked = Endpoint(url, "judge", "SERVED_KEY", max_tokens=4, cache_dir=str(tmp_path)).ask(
        [[{"role": "user", "content": text}] for text in (long, short)]
    )
    assert asked.replies[0].text is None and "HTTP 400" in asked.replies[0].refusal
    assert isinstance(asked.replies[1].text, str)
