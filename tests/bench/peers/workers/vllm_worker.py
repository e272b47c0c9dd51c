"""vLLM's CPU build, offline: no HTTP between the measurement and its engine, which favours it."""

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
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    # With both of these it is faster on few cores than with its own choice, which leaves one core to serving.
    os.environ["OMP_NUM_THREADS"] = str(settings["threads"])
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{settings['threads'] - 1}"
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    batch = settings["batch"]
    lora = {"enable_lora": True, "max_loras": batch, "max_lora_rank": 16} if settings["lora"] else {}
    llm = LLM(settings["base"], dtype=settings["dtype"], max_model_len=1024, max_num_seqs=64, **lora)
    requests = [LoRARequest(f"a{i}", i + 1, f"{settings['adapters']}/a{i}") for i in range(batch)]
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        source = random.Random(ask["seed"])
        prompts = [
            {"prompt_token_ids": [source.randint(100, 40000) for _ in range(ask["prompt_tokens"])]}
            for _ in range(ask["batch"])
        ]
        params = SamplingParams(
            max_tokens=ask["new_tokens"], min_tokens=ask["new_tokens"], temperature=0, ignore_eos=True
        )
        started = time.perf_counter()
        outputs = llm.generate(
            prompts, params, lora_request=requests[: ask["batch"]] if ask["adapters"] else None, use_tqdm=False
        )
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)
