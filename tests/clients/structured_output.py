#!/usr/bin/env python3
"""instructor in its three modes (JSON_SCHEMA, JSON, MD_JSON) and langchain's with_structured_output against this server.

    pip install instructor langchain-openai
    python3 tests/clients/structured_output.py [PROGRAM]

Not part of ./run test: they take minutes to install, and want another openai package than the tests. Exit code 1 if one of
them does not give the object that was asked for.
"""

import enum
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))
if len(sys.argv) > 1:
    os.environ["FLASH_MLA_PROGRAM"] = sys.argv[1]

import instructor  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402
from live_server import Server  # noqa: E402
from openai import OpenAI  # noqa: E402
from pydantic import BaseModel  # noqa: E402


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Answer(BaseModel):
    colour: Colour
    sure: bool


MESSAGES = [{"role": "user", "content": "Which colour?"}]


def with_instructor(url, mode, body):
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none"), mode=mode)
    return client.chat.completions.create(
        model="small",
        messages=MESSAGES,
        response_model=Answer,
        max_retries=0,
        max_tokens=300,
        temperature=0,
        extra_body=body,
    )


def with_langchain(url, method):
    model = ChatOpenAI(model="small", base_url=url, api_key="none", max_tokens=300, temperature=0)
    return model.with_structured_output(Answer, method=method).invoke("Which colour?")


def main():
    server = Server(ROOT / "models" / "small")
    url = f"http://127.0.0.1:{server.port}/v1"
    # The other modes leave the keys to the prompt, which this model cannot follow: it gets them from the schema beside it.
    schema = Answer.model_json_schema()
    modes = {
        instructor.Mode.JSON_SCHEMA: {},
        instructor.Mode.JSON: {"response_format": {"type": "json_object", "schema": schema}},
        instructor.Mode.MD_JSON: {"guided_json": schema},
    }
    calls = [(f"instructor {m.name}", lambda m=m, b=b: with_instructor(url, m, b)) for m, b in modes.items()]
    calls.append(("langchain json_schema", lambda: with_langchain(url, "json_schema")))
    failed = 0
    for name, call in calls:
        try:
            good = isinstance(call(), Answer)
            print("ok  " if good else "FAIL", name)
        except Exception as e:
            good = False
            print("FAIL", name, type(e).__name__, str(e)[:200])
        failed += not good
    server.stop()
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
