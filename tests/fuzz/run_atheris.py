"""The same targets, driven by coverage for as long as one likes: `pip install atheris`, then
`python -m tests.fuzz.run_atheris <target> -max_total_time=120`. Findings are what libFuzzer writes as crash-*."""

import sys

import atheris

with atheris.instrument_imports(include=["server", "sae_core", "tests.fuzz"]):
    from tests.fuzz.targets import TARGETS, Source, attempt


def main() -> None:
    """Fuzz one target; the rest of the command line is libFuzzer's."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"Name a target: {', '.join(TARGETS)}.")
    name = sys.argv.pop(1)

    def one(data: bytes) -> None:
        given = atheris.FuzzedDataProvider(data)

        def below(n: int) -> int:
            return int(given.ConsumeIntInRange(0, max(n - 1, 0)))

        attempt(name, Source(below, lambda n: bytes(given.ConsumeBytes(n)) or b"\0"))

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
