"""`make demo`: one base model learns how a library desk answers, and shows it.

Starts `tenora serve`, uploads `library_train.jsonl`, trains an adapter on it, and asks base and adapter the same three
questions. The state lies in $TENORA_HOME; a second run gives the adapter a new version.
"""

# ruff: noqa: T201 - a program that talks to a terminal

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from columns import side_by_side
from server import Server, ServerError, fetch_base
from snippets import how_to_go_on

from tenora_client import ChatCompletion, Client, Job, TenoraError

HERE = Path(__file__).parent
NAME = "library-desk"
MARK = {"made_by": "tenora-demo"}
MAX_TOKENS = 60
# None of them is in the training file; the last one is about nothing that the file mentions.
QUESTIONS = (
    "Can I bring my parrot to the library?",
    "May I keep a book for a second month?",
    "Can I repair my bicycle in the hall?",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the server running at the end, until Ctrl-C")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a hang-up is to be ignored
            signal.signal(number, _interrupt)
    try:
        fetch_base()
        started = time.monotonic()  # the download is the network's time
        with Server() as server:
            server.wait_until_ready()
            with Client(server.url) as client:
                demonstrate(client, started)
            print(how_to_go_on(server.url if options.keep else None, NAME, QUESTIONS[0]))
            if options.keep:
                print(f"\nThe server runs at {server.url}. Ctrl-C stops it.")
                server.wait()
    except KeyboardInterrupt:
        print("\nStopped. Nothing is left running, and `make demo` starts afresh.")
        return 130
    except (ServerError, TenoraError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def demonstrate(client: Client, started: float) -> None:
    """Train the adapter and show what it has learned. `started` is the monotonic time at which the run began."""
    cancel_leftovers(client)
    job = train(client)
    compare(client)
    evaluation = job.evaluation
    if evaluation is not None and evaluation.base_loss is not None and evaluation.valid_loss is not None:
        print("\nHeld-out loss (nats per token, 12 rows that were never trained on; lower is better)")
        print(f"  base     {evaluation.base_loss:.3f}")
        print(f"  adapter  {evaluation.valid_loss:.3f}")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nElapsed: {minutes} min {seconds:02d} s")


def cancel_leftovers(client: Client) -> None:
    """An earlier demonstration that was killed left a job that would go on now and take half of the machine."""
    for job in client.jobs.list(metadata=MARK):
        if not job.finished:
            job.cancel()


def train(client: Client) -> Job:
    """Upload the two files, fine-tune on them, and give the job that succeeded."""
    training = client.files.upload(HERE / "library_train.jsonl", progress=True)
    held_out = client.files.upload(HERE / "library_valid.jsonl", progress=True)
    # A second run learns the same again: its version is no better than the first's, and is to be seen all the same.
    job = client.jobs.create(training, validation_file=held_out, name=NAME, publish="always", metadata=MARK)
    try:
        job = job.wait(progress=True)
    except KeyboardInterrupt:
        job.cancel()
        raise
    version = client.adapters.get(NAME).version
    print(f"adapter {NAME!r}, version {version}, answers from now on; so does {job.fine_tuned_model!r}")
    return job


def compare(client: Client) -> None:
    """Ask the base and the adapter the same questions and print the answers side by side."""
    width = shutil.get_terminal_size(fallback=(100, 24)).columns
    base = client.models.base().id
    for question in QUESTIONS:
        print(f"\nQ: {question}")
        answers = [ask(client, model, question) for model in (base, NAME)]
        print(side_by_side((f"base: {base}", f"adapter: {NAME}"), answers, width))


def ask(client: Client, model: str, question: str) -> str:
    """The model's most likely answer, with an ellipsis where it was cut."""
    messages = [{"role": "user", "content": question}]
    answer: ChatCompletion = client.chat.create(messages, model=model, temperature=0.0, max_tokens=MAX_TOKENS)
    return answer.text.strip() + (" …" if answer.choices[0].finish_reason == "length" else "")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
