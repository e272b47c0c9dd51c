"""llama.cpp on the Q4_1 file of the base: one stream, no adapter. Its rows of a batch cannot have different ones."""

from __future__ import annotations

import json
import os
import random
import sys
import time

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])

    from llama_cpp import Llama

    threads = settings["threads"]
    llm = Llama(settings["gguf"], n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        source = random.Random(ask["seed"])
        prompt = [source.randint(100, 40000) for _ in range(ask["prompt_tokens"])]
        llm.reset()
        started = time.perf_counter()
        llm.eval(prompt)
        token = llm.sample(temp=0.0)
        first = time.perf_counter() - started
        for _ in range(ask["new_tokens"] - 1):
            llm.eval([token])
            token = llm.sample(temp=0.0)
        seconds = time.perf_counter() - started
        answer = {"seconds": seconds, "first_token_seconds": first, "tokens": ask["new_tokens"]}
        print(json.dumps(answer), file=answers, flush=True)
