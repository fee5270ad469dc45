"""``python -m flash_mla.dynamo --model DIR``: a worker, until it is told to end."""

import sys


def main():
    from .arguments import parse

    arguments = parse()
    try:
        from dynamo.common.backend.run import run

        from .worker import Worker
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] not in ("dynamo", "uvloop"):
            raise
        sys.exit(f"flash_mla.dynamo: no module {e.name}: pip install ai-dynamo==1.6.1 (docs/dynamo.md)")

    async def make(_):
        return Worker.of(arguments)

    run(Worker, engine_factory=make)


if __name__ == "__main__":
    main()
