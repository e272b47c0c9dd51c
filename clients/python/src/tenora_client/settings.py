"""Settings of a job. Written by `clients/python/scripts/settings.py`, from the service's: do not edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Required, TypedDict

from tenora_client.api_object import ApiObject, Part
from tenora_client.ranges import Range, RangeParams

MethodName = Literal["supervised", "dpo", "feature_extraction", "full"]


class RowParams(TypedDict, total=False):
    """How rows are read; absent means the server's default, which is meant to work."""

    max_seq_length: int
    """Tokens of a row; longer ones are refused, or cut with truncate; a whole number from 8 to 2147483647."""
    truncate: bool
    """Cut rows that are too long, do not refuse them; true or false."""


class Settings(RowParams, total=False):
    """How a job trains; absent means the server's default, which is meant to work."""

    n_epochs: int | Literal["auto"]
    """Passes over the rows; a whole number from 1 to 50, or "auto"."""
    batch_size: int | Literal["auto"]
    """Examples of an optimizer step: rows, or pairs of them; a whole number from 1 to 256, or "auto"."""
    max_steps: int
    """Optimizer steps, instead of epochs; 0 lets the epochs decide; a whole number from 0 to 1000000."""
    learning_rate: float
    """Peak of the schedule, instead of a multiplier; a number, above 0 and at most 1."""
    scheduler: Literal["linear", "cosine", "constant"]
    """Course of the learning rate after its warm-up; one of linear, cosine, constant."""
    warmup_ratio: float
    """Share of the steps in which the rate rises; a number, at least 0 and at most 1."""
    weight_decay: float
    """Decoupled weight decay of AdamW; a number, at least 0 and at most 1."""
    max_grad_norm: float
    """Gradients are clipped to this norm; a number, above 0 and at most 1000."""
    eval_interval: int
    """Optimizer steps between evaluations; 0 is once an epoch; a whole number from 0 to 1000000."""
    early_stopping: bool | int
    """End after so many evaluations without a better one; true is 3, 0 never does; true (3), false or a whole number
    from 0 to 1000."""
    packing: bool
    """Rows share passes; false gives each a pass of its own, with the same result; true or false."""
    publish: Literal["always", "if_better", "never"]
    """Whether `name` shall mean the result; one of always, if_better, never."""
    min_gain: float
    """With if_better: the gain that is asked for, in the unit of the method's losses; of a new name over the base; a
    number, at least 0 and at most 100."""


class SharedHyperparameters(TypedDict, total=False):
    """Those that all methods have."""

    n_epochs: int | Literal["auto"]
    """Passes over the rows; a whole number from 1 to 50, or "auto"."""
    batch_size: int | Literal["auto"]
    """Examples of an optimizer step: rows, or pairs of them; a whole number from 1 to 256, or "auto"."""
    learning_rate_multiplier: float | Literal["auto"]
    """Scales the method's usual rate; a number, at least 0.0001 and at most 100, or "auto"."""


class SupervisedParams(TypedDict, total=False):
    """Options of the method supervised."""

    hyperparameters: SharedHyperparameters


class DpoHyperparameters(SharedHyperparameters, total=False):
    """Those of a job that learns which of two answers is preferred."""

    beta: float | Literal["auto"]
    """How strongly the policy is held to the adapter that it starts from; a number, at least 1e-06 and at most 10,
    or "auto"."""


class DpoParams(TypedDict, total=False):
    """Options of the method dpo."""

    hyperparameters: DpoHyperparameters


class FeatureExtractionHyperparameters(SharedHyperparameters, total=False):
    """Those of a job that learns labels with a head on the base's hidden states."""

    inverse_regularization: float | Literal["auto"]
    """How little the head's weights are held back, with train_layers 0; scikit-learn's C; a number, at least 1e-09
    and at most 1e+09, or "auto"."""


class FeatureExtractionHeadParams(TypedDict, total=False):
    """Head of a job that learns labels with a head on the base's hidden states."""

    type: Literal["classification", "regression", "scalar", "embedding"]
    """What the head says: a class, a number that is told in its labels' units (regression), a number to compare by
    (scalar), or a vector (embedding, from rows of anchor and positive); one of classification, regression, scalar,
    embedding."""
    name: str
    """What requests call the head; its type if absent; a name of 1 to 64 characters."""
    labels: Sequence[str]
    """The classes, in the order of their numbers; those of the training rows, sorted, if absent; a list of class
    names."""
    multi_label: bool
    """A row may have any number of the classes; true where `label` is a list; true or false."""
    pooling: Literal["last", "mean"] | Literal["auto"]
    """Which tokens the head reads: the last one, or the mean of all; one of last, mean, or "auto"."""
    layer: int | Literal["auto"]
    """Which layer's output the head reads: -1 is the last one, after the final norm; a whole number from -4 to -1,
    or "auto"."""
    dims: int
    """Length of an embedding; 0 is that of a hidden state; a whole number from 0 to 4096."""


class FeatureExtractionParams(TypedDict, total=False):
    """Options of the method feature_extraction."""

    hyperparameters: FeatureExtractionHyperparameters
    head: FeatureExtractionHeadParams
    train_layers: int | Literal["lora"]
    """What learns with the head: 0 nothing of the base, N its last N layers, "lora" all of them; "lora" or a whole
    number from 0 to 1024."""


class FullParams(TypedDict, total=False):
    """Options of the method full."""

    hyperparameters: SharedHyperparameters
    layers: str
    """Layers that are trained: all, "last 4", or numbers from 0 such as "0, 5-8"; all, "last N" or numbers of layers
    such as "0, 5-8"."""
    embeddings: bool
    """Train the tokens' embeddings and the head too; an adapter cannot carry that; true or false."""
    norms: bool
    """Train the weights of norms, and biases, too; an adapter cannot carry that; true or false."""
    serve_as: Literal["adapter", "none"]
    """What is served: adapter, the difference to the base as an adapter, if the gate finds it close enough; none,
    only the model to download; one of adapter, none."""


class MethodParams(TypedDict, total=False):
    """How to train: a type, and its options."""

    type: Required[MethodName]
    supervised: SupervisedParams
    dpo: DpoParams
    feature_extraction: FeatureExtractionParams
    full: FullParams


class LoraParams(TypedDict, total=False):
    """The adapter; absent means the server's default, which is meant to work."""

    rank: int
    """Rank of the adapter; a whole number from 1 to 256."""
    alpha: float
    """Scales the adapter by alpha / rank; twice the rank; a number, above 0 and at most 4096."""
    dropout: float
    """Of the adapter's inputs; a number, at least 0 and at most 0.9."""
    target_modules: Sequence[str] | Literal["all-linear"]
    """Last parts of the paths of what it adapts; "all-linear" or a list of module names."""
    use_rslora: bool
    """Scale by alpha / root of rank; true or false."""
    lora_plus_ratio: float
    """B learns at so many times the rate of A (LoRA+); 1 is usual, 16 LoRA+'s; a number, at least 1 and at most 64."""
    init: Literal["kaiming", "eva"]
    """How A begins: kaiming, at random; eva, as the directions in which the inputs of each module differ most over
    the first rows, with ranks moved to where they explain more (EVA); one of kaiming, eva."""
    eva_rho: float
    """With eva: a module's rank is at most so many times the rank; 1 moves none; a number, at least 1 and at most 8."""
    init_from: str
    """An adapter of yours to start from; the name of an adapter."""


class AdapterParams(LoraParams, total=False):
    """What the adapter is: a type, and those settings that it has."""

    type: Required[Literal["lora", "alora", "dora", "ia3", "bottleneck", "parallel", "prefix", "prompt"]]
    invocation: str
    """The string from which on the adapter acts, where it occurs last; empty: what the chat template puts before an
    answer; a text of up to 600 characters."""
    reduction_factor: float
    """Width of the hidden states divided by that of a bottleneck; a number, at least 1 and at most 10000."""
    non_linearity: Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "tanh"]
    """Function between the two matrices of a bottleneck; one of silu, gelu, gelu_pytorch_tanh, relu, tanh."""
    placement: Literal["houlsby", "pfeiffer"]
    """houlsby: after attention and MLP, on a block's output; pfeiffer: after the MLP, on the residual stream; one of
    houlsby, pfeiffer."""
    scaling: float
    """What a bottleneck's output is multiplied with; a number, above 0 and at most 1000."""
    num_virtual_tokens: int
    """How many virtual tokens come before every text; they take room of the context; a whole number from 1 to 1024."""


class SweptParams(TypedDict, total=False):
    """Values to try, one by one or as a range."""

    rank: Sequence[int] | RangeParams
    learning_rate: Sequence[float] | RangeParams
    n_epochs: Sequence[int] | RangeParams
    batch_size: Sequence[int] | RangeParams


class Hyperparameters(Part):
    """Of a job's method; "auto" until the files have been read."""

    n_epochs: int | Literal["auto"] | None = None
    batch_size: int | Literal["auto"] | None = None
    learning_rate_multiplier: float | Literal["auto"] | None = None
    beta: float | Literal["auto"] | None = None
    inverse_regularization: float | Literal["auto"] | None = None


class HeadOptions(Part):
    """Head of a method."""

    type: str | None = None
    name: str | None = None
    labels: Sequence[str] | None = None
    multi_label: bool | None = None
    pooling: str | Literal["auto"] | None = None
    layer: int | Literal["auto"] | None = None
    dims: int | None = None


class MethodOptions(Part):
    """Of one method."""

    hyperparameters: Hyperparameters | None = None
    head: HeadOptions | None = None
    train_layers: int | str | None = None
    layers: str | None = None
    embeddings: bool | None = None
    norms: bool | None = None
    serve_as: str | None = None


class Method(Part):
    """How a job trains: the options of its type are there."""

    type: str
    supervised: MethodOptions | None = None
    dpo: MethodOptions | None = None
    feature_extraction: MethodOptions | None = None
    full: MethodOptions | None = None


class Lora(Part):
    """The adapter; whole once the files have been read, but for what a sweep still chooses."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: Sequence[str] | str | None = None
    use_rslora: bool | None = None
    lora_plus_ratio: float | None = None
    init: str | None = None
    eva_rho: float | None = None
    init_from: str | None = None


class AdapterSettings(Lora):
    """The adapter, of any type; what its type has is there."""

    type: str = "lora"
    invocation: str | None = None
    reduction_factor: float | None = None
    non_linearity: str | None = None
    placement: str | None = None
    scaling: float | None = None
    num_virtual_tokens: int | None = None


class SweptValues(Part):
    """The values to try."""

    rank: Sequence[float] | Range | None = None
    learning_rate: Sequence[float] | Range | None = None
    n_epochs: Sequence[float] | Range | None = None
    batch_size: Sequence[float] | Range | None = None


class TrialSettings(Part):
    """Of a trial of a sweep."""

    rank: int | None = None
    alpha: float | None = None
    learning_rate: float | None = None
    n_epochs: int | None = None
    batch_size: int | None = None


class JobSettings(ApiObject):
    """A job's settings as they are used."""

    max_steps: int | None = None
    learning_rate: float | None = None
    scheduler: str | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    eval_interval: int | None = None
    early_stopping: int | None = None
    packing: bool | None = None
    max_seq_length: int | None = None
    truncate: bool | None = None
    publish: str | None = None
    min_gain: float | None = None


class EstimatedSettings(ApiObject):
    """Those that an estimate repeats."""

    n_epochs: int | Literal["auto"] | None = None
    batch_size: int | Literal["auto"] | None = None
    publish: str | None = None
    min_gain: float | None = None
