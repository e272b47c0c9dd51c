"""The data plane: sequences, scheduler, KV blocks, sampler, step loop; its own process."""
