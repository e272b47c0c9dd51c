"""PEFT's mixed batches: `generate` of transformers, each row with its own adapter by `adapter_names`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(settings["threads"])}

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    base = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=getattr(torch, settings["dtype"]))
    model = PeftModel.from_pretrained(base, f"{settings['adapters']}/a0", adapter_name="a0")
    for i in range(1, settings["batch"]):
        model.load_adapter(f"{settings['adapters']}/a{i}", adapter_name=f"a{i}")
    # PEFT keeps adapters in float32 beside a bfloat16 base unless they are cast.
    model.to(getattr(torch, settings["dtype"])).eval()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        torch.manual_seed(ask["seed"])
        ids = torch.randint(100, 40000, (ask["batch"], ask["prompt_tokens"]))
        options = {"max_new_tokens": ask["new_tokens"], "min_new_tokens": ask["new_tokens"], "do_sample": False}
        if ask["adapters"]:
            options["adapter_names"] = [f"a{i}" for i in range(ask["batch"])]
        started = time.perf_counter()
        with torch.inference_mode(), contextlib.nullcontext() if ask["adapters"] else model.disable_adapter():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        seconds = time.perf_counter() - started
        tokens = out.shape[0] * (out.shape[1] - ids.shape[1])
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)
