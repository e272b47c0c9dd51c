"""Every kind of adapter that is refused, with the reason that the message must give."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tenora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_adapter, validate_files
from tenora.errors import AdapterFormatError
from tests.adapters.files import PREFIX, ROWS, config, raw_safetensors, save, tensors

Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


def refusal(directory: Path, max_rank: int = 64) -> str:
    """The message with which both ways in refuse the adapter; they must agree."""
    with pytest.raises(AdapterFormatError) as read:
        read_adapter(directory, ROWS, max_rank=max_rank)
    if (directory / WEIGHTS_NAME).exists() and (directory / CONFIG_NAME).exists():
        with pytest.raises(AdapterFormatError) as validated:
            validate_files((directory / CONFIG_NAME).read_bytes(), directory / WEIGHTS_NAME, ROWS, max_rank=max_rank)
        assert validated.value.message == read.value.message
    assert read.value.message.endswith("."), "a message is a sentence"
    return read.value.message


def test_the_unchanged_one_is_accepted(tmp_path: Path) -> None:
    save(tmp_path, config(), tensors())
    assert read_adapter(tmp_path, ROWS, max_rank=64).target_modules == ("q_proj", "down_proj")


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "other peft_type": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; adapters of the kinds head, dora, alora, lora"),
    "no peft_type": ({"peft_type": None}, "peft_type is None"),
    "classifier of tokens": ({"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS'"),
    "classifier without its head": ({"task_type": "SEQ_CLS"}, "score.weight is not in the file; save the adapter with"),
    "DoRA without magnitudes": (
        {"use_dora": True},
        "self_attn.q_proj.lora_magnitude_vector is missing, but use_dora needs it",
    ),
    "DoRA that is neither": ({"use_dora": "yes"}, "use_dora is 'yes': it must be true or false"),
    "DoRA with an invocation": (
        {"use_dora": True, "alora_invocation_tokens": [3]},
        "alora_invocation_tokens is [3]: a DoRA adapter is not activated",
    ),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is [[0, 2]"),
    "trained tokens": ({"trainable_token_indices": [5]}, "trainable_token_indices is [5]"),
    "parameters": ({"target_parameters": ["experts.w"]}, "target_parameters is ['experts.w']"),
    "auto_map": ({"auto_map": {"AutoModel": "evil--model.Evil"}}, "auto_map is {'AutoModel'"),
    "an aLoRA that is never invoked": ({"alora_invocation_tokens": []}, "alora_invocation_tokens is []; it must be"),
    "an invocation of text": ({"alora_invocation_tokens": "<check>"}, "alora_invocation_tokens is '<check>'; it must"),
    "an invocation that is too long": ({"alora_invocation_tokens": [1] * 257}, "it must be a list of 1 to 256 token"),
    "an invocation of no tokens": ({"alora_invocation_tokens": [1, -2]}, "is [1, -2]; a token id is a whole number"),
    "QALoRA": ({"use_qalora": True}, "use_qalora is True"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "a field of the future": ({"use_teleport": 7}, "use_teleport is 7, a field that this version does not know"),
    "rank 0": ({"r": 0}, "r is 0; a rank is a whole number from 1"),
    "rank -1": ({"r": -1}, "r is -1"),
    "rank true": ({"r": True}, "r is True"),
    "rank text": ({"r": "4"}, "r is '4'"),
    "no rank": ({"r": None}, "r is None"),
    "rank_pattern 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
    "rank_pattern list": ({"rank_pattern": [1]}, "rank_pattern must map"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    "no targets": ({"target_modules": None}, "target_modules is None; it must be a list"),
    "empty targets": ({"target_modules": []}, "target_modules is []"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules is [1]"),
    "unknown targets": (
        {"target_modules": ["c_proj", "c_attn"]},
        "target_modules names 'c_proj', which this base does not have",
    ),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules names 'embed_tokens'"),
    "nothing matched": ({"target_modules": "q_proj"}, "matches none; this base has down_proj, gate_proj"),
    "no such layer": ({"layers_to_transform": [7]}, "matches none"),
    "layers of text": ({"layers_to_transform": ["0"]}, "layers_to_transform is ['0']"),
    "layers_pattern regex": (
        {"layers_to_transform": [0], "layers_pattern": "(a+)+"},
        "layers_pattern is '(a+)+'; only plain",
    ),
    "look-around": (
        {"target_modules": ".*(?=q_proj)q_proj"},
        "look-around is read only at the start of target_modules and before no alternatives. List module names",
    ),
    "broken regex": ({"target_modules": "(q_proj"}, "'(q_proj', which cannot be read: Python does not read it"),
    "broken key": ({"rank_pattern": {"q_proj)|(": 3}}, "rank_pattern holds the pattern 'q_proj)|('"),
    "targets that leave a tensor out": (
        {"target_modules": ["q_proj"]},
        "mlp.down_proj.lora_A.weight is in the file, but target_modules",
    ),
    "layers that leave a tensor out": ({"layers_to_transform": [0, 1]}, "model.layers.2"),
    "exclusions that leave a tensor out": (
        {"exclude_modules": ["down_proj"]},
        "mlp.down_proj.lora_A.weight is in the file",
    ),
    "targets without tensors": (
        {"target_modules": ["q_proj", "down_proj", "k_proj"]},
        "self_attn.k_proj.lora_A.weight is missing",
    ),
    "rank unlike the tensors'": (
        {"r": 5},
        "q_proj.lora_A.weight has shape [4, 48], but this base and the configuration's rank need [5, 48]",
    ),
    "rank_pattern unlike the tensors'": (
        {"rank_pattern": {"layers.1.mlp.down_proj": 5}},
        "model.layers.1.mlp.down_proj.lora_A.weight has shape [4, 112]",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_configuration(case: str, tmp_path: Path) -> None:
    change, reason = FIELDS[case]
    save(tmp_path, config(**change), tensors())
    assert reason in refusal(tmp_path)


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.pop(name)


def _put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.update({name: value})


def _set(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights[name].__setitem__((1, 2), value)


ONES = np.ones((4, 48), np.float32)
WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no A": (_drop(f"{Q0}.lora_A.weight"), f"{Q0}.lora_A.weight is missing"),
    "no B": (_drop(f"{Q0}.lora_B.weight"), f"{Q0}.lora_B.weight is missing"),
    "NaN": (_set(f"{Q0}.lora_A.weight", float("nan")), f"{Q0}.lora_A.weight holds NaN or infinite"),
    "infinity": (_set(f"{Q0}.lora_B.weight", float("-inf")), f"{Q0}.lora_B.weight holds NaN or infinite"),
    "other width": (_put(f"{Q0}.lora_A.weight", np.ones((4, 47), np.float32)), "has shape [4, 47], but this base"),
    "transposed": (_put(f"{Q0}.lora_B.weight", np.ones((4, 48), np.float32)), "has shape [4, 48], but this base"),
    "three axes": (_put(f"{Q0}.lora_A.weight", np.ones((1, 4, 48), np.float32)), "has shape [1, 4, 48]"),
    "empty": (_put(f"{Q0}.lora_A.weight", np.ones((0, 48), np.float32)), "a rank of 0 adapts nothing"),
    "head": (_put(f"{PREFIX}lm_head.lora_A.weight", ONES), "adapts lm_head, which this base does not have"),
    "layer 9": (
        _put(f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight", ONES),
        "adapts model.layers.9.self_attn.q_proj",
    ),
    "adapter name": (
        _put(f"{Q0}.lora_A.default.weight", ONES),
        f"{Q0}.lora_A.default.weight is of a state_dict, with the adapter's name in it; save the adapter",
    ),
    "no prefix": (_put("model.layers.0.self_attn.q_proj.lora_A.weight", ONES), "is not named as PEFT saves it"),
    "kohya": (_put("lora_unet_down_blocks_0.lora_down.weight", ONES), "is of a kohya adapter for image models"),
    "kohya's alpha": (_put(f"{Q0}.alpha", np.ones((), np.float32)), "as kohya's tools name it (lora_down, lora_up"),
    "diffusers": (_put("transformer.blocks.0.attn.to_q.lora_A.weight", ONES), "is of a diffusers adapter for image"),
    "MLX": (_put("model.layers.0.self_attn.q_proj.lora_a", ONES), "MLX, which also stores A and B transposed"),
    "compiled": (
        _put(f"{PREFIX}_orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight", ONES),
        f"is of a wrapped model; rename its tensors to {PREFIX}<module>.lora_A.weight",
    ),
    "twice": (_put(f"{PREFIX}{Q0}.lora_A.weight", ONES), "is of a PEFT model within a PEFT model"),
    "images and text": (
        _put(f"{PREFIX}model.language_model.layers.0.self_attn.q_proj.lora_A.weight", ONES),
        "is of a model for images and text; train on the text model itself",
    ),
    "AutoModel": (
        _put(f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight", ONES),
        "was trained on AutoModel, without the head; train on AutoModelForCausalLM",
    ),
    "magnitude": (_put(f"{Q0}.lora_magnitude_vector", np.ones(48, np.float32)), "belongs to DoRA"),
    "embedding": (_put(f"{PREFIX}model.embed_tokens.lora_embedding_A", ONES), "adapts the embeddings"),
    "bias": (_put(f"{Q0}.lora_B.bias", np.ones(48, np.float32)), "is a bias"),
    "base bias": (_put(f"{Q0}.base_layer.bias", np.ones(48, np.float32)), "is a bias"),
    "full module": (_put(f"{PREFIX}lm_head.weight", ONES), "is not a low-rank weight"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case: str, tmp_path: Path) -> None:
    change, reason = WEIGHTS[case]
    weights = tensors()
    change(weights)
    save(tmp_path, config(), weights)
    assert reason in refusal(tmp_path)


def test_nan_in_sixteen_bits(tmp_path: Path) -> None:
    for bad in (np.uint16(0x7FC0), np.uint16(0xFF80)):  # a NaN and minus infinity in bfloat16
        weights: dict[str, Any] = {name: np.full(value.shape, 0x3F80, np.uint16) for name, value in tensors().items()}
        save(tmp_path, config(), weights)
        read_adapter(tmp_path, ROWS, max_rank=64)
        weights[f"{Q0}.lora_A.weight"][3, 47] = bad
        save(tmp_path, config(), weights)
        assert f"{Q0}.lora_A.weight holds NaN" in refusal(tmp_path)
    weights = {name: value.astype(np.float16) for name, value in tensors().items()}
    weights[f"{Q0}.lora_B.weight"][0, 0] = np.inf
    save(tmp_path, config(), weights)
    assert f"{Q0}.lora_B.weight holds NaN" in refusal(tmp_path)


def test_rank_above_the_limit(tmp_path: Path) -> None:
    save(tmp_path, config(r=8), tensors(rank=8))
    assert "model.layers.0.self_attn.q_proj has rank 8; this server accepts ranks up to 7." in refusal(tmp_path, 7)
    assert read_adapter(tmp_path, ROWS, max_rank=8).rank == 8


def test_too_many_tensors(tmp_path: Path) -> None:
    weights = {**tensors(), **{f"extra.{i}": np.ones(1, np.float32) for i in range(80)}}
    save(tmp_path, config(), weights)
    assert "holds 92 tensors, far more than this base has modules" in refusal(tmp_path)


def test_another_writers_file_is_told_by_its_names_and_not_by_what_it_lacks(tmp_path: Path) -> None:
    weights = {name.removeprefix(PREFIX): value for name, value in tensors().items()}
    save(tmp_path, config(), weights)
    assert refusal(tmp_path).endswith(
        "is not named as PEFT saves it (base_model.model.<module>.lora_A.weight); rename its tensors to "
        "base_model.model.<module>.lora_A.weight, or save it with PeftModel.save_pretrained."
    )


def test_a_float64_weight_beyond_float32_is_refused(tmp_path: Path) -> None:
    header = {f"{Q0}.lora_A.weight": np.full((4, 48), 1e300), f"{Q0}.lora_B.weight": np.ones((48, 4))}
    save(tmp_path, config(target_modules=["layers.0.self_attn.q_proj"]), {})
    safetensors.numpy.save_file(header, tmp_path / WEIGHTS_NAME)
    assert f"{Q0}.lora_A.weight holds NaN or infinite" in refusal(tmp_path)


def _entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "are not a safetensors file"),
    "short": (b"\x01\x00\x00", "are not a safetensors file"),
    "huge header": (raw_safetensors(b"{}", length=2**40), "exceeds the file"),
    "huge header, huge file": (raw_safetensors(b"{" + b" " * (9 * 2**20) + b"}"), "or the limit of 8388608 bytes"),
    "header past the end": (raw_safetensors(b"{}", length=3), "exceeds the file"),
    "no JSON": (raw_safetensors(b"{not json}"), "the safetensors header is not valid JSON"),
    "no UTF-8": (raw_safetensors(b'{"\xff": 1}'), "the safetensors header is not valid JSON"),
    "a list": (raw_safetensors(b"[]"), "must be a JSON object"),
    "deep": (raw_safetensors(b"[" * 100_000), "the safetensors header is not valid JSON"),
    "a name twice": (raw_safetensors(b'{"a": 1, "a": 2}'), "a name occurs twice"),
    "NaN": (raw_safetensors(b'{"a": NaN}'), "NaN is not JSON"),
    "a long number": (raw_safetensors(b'{"a": ' + b"1" * 10_000 + b"}"), "is not valid JSON"),
    "a long name": (
        raw_safetensors(_header(**{"a" * 600: _entry([1], [0, 4])}), b"1234"),
        "a tensor name of 600 characters",
    ),
    "metadata": (raw_safetensors(b'{"__metadata__": {"a": 1}}'), "__metadata__"),
    "no shape": (
        raw_safetensors(_header(a={"dtype": "F32", "data_offsets": [0, 4]}), b"1234"),
        "a must have a dtype, a shape",
    ),
    "integers": (
        raw_safetensors(_header(a=_entry([1], [0, 4], "I32")), b"1234"),
        "a is of type 'I32'; use one of F32, F16, BF16, F64",
    ),
    "type is a list": (
        raw_safetensors(b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        "a is of type []",
    ),
    "negative size": (raw_safetensors(_header(a=_entry([-1], [0, 4])), b"1234"), "a has a shape that is not"),
    "size of text": (raw_safetensors(_header(a=_entry(["1"], [0, 4])), b"1234"), "a has a shape that is not"),
    "size is true": (raw_safetensors(_header(a=_entry([True], [0, 4])), b"1234"), "a has a shape that is not"),
    "overflow": (raw_safetensors(_header(a=_entry([2**62, 2**62], [0, 4])), b"1234"), "a has a shape that is not"),
    "many axes": (raw_safetensors(_header(a=_entry([1] * 9, [0, 4])), b"1234"), "a has a shape that is not"),
    "swapped offsets": (raw_safetensors(_header(a=_entry([1], [4, 0])), b"1234"), "not two ascending positions"),
    "one offset": (raw_safetensors(_header(a=_entry([1], [4])), b"1234"), "not two ascending positions"),
    "size unlike the shape": (
        raw_safetensors(_header(a=_entry([2], [0, 4])), b"1234"),
        "a has 4 bytes, but its shape [2] in F32 needs 8",
    ),
    "overlap": (
        raw_safetensors(_header(a=_entry([2], [0, 8]), b=_entry([2], [4, 12])), b"123456789012"),
        "b overlaps another tensor",
    ),
    "gap": (
        raw_safetensors(_header(a=_entry([1], [0, 4]), b=_entry([1], [8, 12])), b"123456789012"),
        "b overlaps another tensor or follows a gap",
    ),
    "starts late": (raw_safetensors(_header(a=_entry([1], [4, 8])), b"12345678"), "follows a gap"),
    "trailing bytes": (raw_safetensors(_header(a=_entry([1], [0, 4])), b"1234567"), "truncated or has trailing bytes"),
    "truncated": (raw_safetensors(_header(a=_entry([2], [0, 8])), b"1234"), "truncated or has trailing bytes"),
    "zip": (b"PK\x03\x04" + b"\x00" * 100, "a pickle or zip archive, which is never opened"),
}


@pytest.mark.parametrize("case", FILES)
def test_malformed_files(case: str, tmp_path: Path) -> None:
    content, reason = FILES[case]
    save(tmp_path, config(), tensors())
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    assert reason in refusal(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save(tmp_path, config(), tensors())
    whole = (tmp_path / WEIGHTS_NAME).read_bytes()
    for length in [0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 1]:
        (tmp_path / WEIGHTS_NAME).write_bytes(whole[:length])
        assert refusal(tmp_path)


class _Canary:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "adapter_model.bin", CONFIG_NAME])
def test_a_pickle_never_runs(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    adapter = save(tmp_path / "adapter", config(), tensors())
    if name == "adapter_model.bin":
        (adapter / WEIGHTS_NAME).unlink()
    (adapter / name).write_bytes(pickle.dumps(_Canary(canary)))
    message = refusal(adapter)
    assert "pickle" in message or "not valid JSON" in message
    assert not canary.exists()
    pickle.loads((adapter / name).read_bytes())
    assert canary.exists(), "the canary itself must work"


def test_missing_files(tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", config(), tensors())
    (adapter / WEIGHTS_NAME).unlink()
    assert "adapter_model.safetensors is missing" in refusal(adapter)
    (adapter / CONFIG_NAME).unlink()
    assert "adapter_config.json is missing" in refusal(adapter)
    with pytest.raises(FileNotFoundError):
        read_adapter(tmp_path / "nowhere", ROWS, max_rank=64)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"r": 1, "r": 2}', b"\xff\xfe", b"[" * 100_000])
def test_configurations_that_are_no_json_object(text: bytes, tmp_path: Path) -> None:
    save(tmp_path, config(), tensors())
    (tmp_path / CONFIG_NAME).write_bytes(text)
    assert "adapter_config.json" in refusal(tmp_path)


def test_a_configuration_of_a_megabyte(tmp_path: Path) -> None:
    save(tmp_path, config(revision="x" * 2**20), tensors())
    assert "over 1048576 bytes" in refusal(tmp_path)
