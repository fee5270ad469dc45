#!/usr/bin/env python3
"""openai, litellm, langchain-openai, llm and aisuite against this server, as their users call them.

    pip install openai litellm langchain-openai llm docstring-parser && pip install --no-deps aisuite
    python3 tests/clients/chat_clients.py [PROGRAM]

Not part of ./run test: litellm alone brings a hundred packages. (openai and langchain-openai are tested there as well:
tests/python/test_openai_client.py, test_tools.py.) Every client asks the same greedy question, and must bring the server's own
answer, whole and, where it can, streamed. Exit code 1 if one does not.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))
if len(sys.argv) > 1:
    os.environ["FLASH_MLA_PROGRAM"] = sys.argv[1]
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched

import aisuite  # noqa: E402
import litellm  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402
from live_server import Server  # noqa: E402
from openai import OpenAI  # noqa: E402

QUESTION = "The family of Dashwood"
MESSAGES = [{"role": "user", "content": QUESTION}]
SAMPLING = {"max_tokens": 30, "temperature": 0}


def with_openai(url):
    client = OpenAI(base_url=url, api_key="none")
    chat = client.chat.completions.create
    yield chat(model="small", messages=MESSAGES, **SAMPLING).choices[0].message.content
    chunks = chat(model="small", messages=MESSAGES, stream=True, **SAMPLING)
    yield "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def with_litellm(url):
    arguments = {"model": "openai/small", "api_base": url, "api_key": "none", "messages": MESSAGES, **SAMPLING}
    yield litellm.completion(**arguments).choices[0].message.content
    yield "".join(c.choices[0].delta.content or "" for c in litellm.completion(stream=True, **arguments))


def with_langchain(url):
    model = ChatOpenAI(model="small", base_url=url, api_key="none", **SAMPLING)
    yield model.invoke(QUESTION).content
    yield "".join(str(c.content) for c in model.stream(QUESTION))


def with_llm(url):
    """Its models of other servers stand in a file of its folder."""
    with tempfile.TemporaryDirectory() as folder:
        entry = f"- model_id: small\n  model_name: small\n  api_base: {url}\n"
        (pathlib.Path(folder) / "extra-openai-models.yaml").write_text(entry)
        environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        options = [x for name, value in SAMPLING.items() for x in ("-o", name, str(value))]
        for streamed in ([], ["--no-stream"]):
            command = [sys.executable, "-m", "llm", "-m", "small", *options, *streamed, "--no-log", QUESTION]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr
            yield done.stdout.removesuffix("\n")


def with_aisuite(url):
    client = aisuite.Client({"openai": {"base_url": url, "api_key": "none"}})
    yield client.chat.completions.create(model="openai:small", messages=MESSAGES, **SAMPLING).choices[0].message.content


def main():
    server = Server(ROOT / "models" / "small")
    url = f"http://127.0.0.1:{server.port}/v1"
    body = {"model": "small", "messages": MESSAGES, **SAMPLING}
    expected = server.json("/v1/chat/completions", json.dumps(body))["choices"][0]["message"]["content"]
    assert len(expected) > 20, expected
    failed = 0
    for client in (with_openai, with_litellm, with_langchain, with_llm, with_aisuite):
        name = client.__name__.removeprefix("with_")
        try:
            answers = list(client(url))
            good = bool(answers) and all(answer == expected for answer in answers)
            print("ok  " if good else "FAIL", name, "" if good else (answers, expected))
        except Exception as e:  # what a client throws is its verdict
            good = False
            print("FAIL", name, type(e).__name__, str(e)[:300])
        failed += not good
    server.stop()
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
