"""Programs that run in the peers' environments, alone: they import their peer and the standard library only.

Each takes one JSON object as its argument, answers `{"ready": …}` on stdout when it has loaded, then for each line of
JSON on stdin (`batch`, `adapters`, `prompt_tokens`, `new_tokens`, `seed`) measures and answers with `{"seconds": …}`.
What the peer itself prints goes to stderr.
"""
