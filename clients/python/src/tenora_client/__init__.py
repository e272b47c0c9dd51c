"""Python client of the Tenora adapter service: chat, files, fine-tuning jobs, adapters.

from tenora_client import Client

with Client() as client:
    file = client.files.upload("train.jsonl", progress=True)
    job = client.jobs.create(file, name="my-adapter").wait(progress=True)
    print(client.chat.create([{"role": "user", "content": "Hello"}], model="my-adapter").text)
"""

from tenora_client.async_client import AsyncClient
from tenora_client.async_jobs import AsyncJob
from tenora_client.async_paging import AsyncPages
from tenora_client.async_streams import AsyncStream
from tenora_client.client import Client
from tenora_client.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    ConflictError,
    JobError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitedError,
    RequestError,
    RequestTimeoutError,
    ResponseError,
    ServerError,
    StatusError,
    StorageFullError,
    StreamError,
    TenoraError,
    TransportError,
    UnavailableError,
    UnprocessableError,
)
from tenora_client.evaluation import (
    Comparison,
    Evaluation,
    EvaluationPoint,
    FullModel,
    Judgement,
    Published,
    Replaced,
    TaskResult,
)
from tenora_client.job_parts import CheckpointMetrics, Sweep, Trial
from tenora_client.jobs import Job
from tenora_client.models import (
    Adapter,
    ApiKey,
    ChatChunk,
    ChatCompletion,
    Checkpoint,
    Completion,
    Deleted,
    Estimate,
    File,
    JobEvent,
    JobState,
    Model,
    NewApiKey,
    Preview,
    Tenant,
    Usage,
)
from tenora_client.paging import Pages
from tenora_client.params import Answers, MergedAdapters, SweepParams, TrainingFileParams, WeightedAdapter
from tenora_client.pooled import (
    Classification,
    Classifications,
    Embedding,
    EmbeddingList,
    Pooled,
    PooledData,
    Reward,
    Rewards,
)
from tenora_client.progress import Bar, JobBar
from tenora_client.ranges import Range, RangeParams
from tenora_client.retry import RetryPolicy
from tenora_client.settings import Hyperparameters, Lora, LoraParams, Method, MethodParams
from tenora_client.streams import Stream
from tenora_client.version import __version__

__all__ = [
    "Adapter",
    "Answers",
    "ApiKey",
    "AsyncClient",
    "AsyncJob",
    "AsyncPages",
    "AsyncStream",
    "AuthenticationError",
    "BadRequestError",
    "Bar",
    "ChatChunk",
    "ChatCompletion",
    "Checkpoint",
    "CheckpointMetrics",
    "Classification",
    "Classifications",
    "Client",
    "Comparison",
    "Completion",
    "ConfigurationError",
    "ConflictError",
    "Deleted",
    "Embedding",
    "EmbeddingList",
    "Estimate",
    "Evaluation",
    "EvaluationPoint",
    "File",
    "FullModel",
    "Hyperparameters",
    "Job",
    "JobBar",
    "JobError",
    "JobEvent",
    "JobState",
    "Judgement",
    "Lora",
    "LoraParams",
    "MergedAdapters",
    "Method",
    "MethodParams",
    "Model",
    "NewApiKey",
    "NotFoundError",
    "Pages",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "Pooled",
    "PooledData",
    "Preview",
    "Published",
    "Range",
    "RangeParams",
    "RateLimitedError",
    "Replaced",
    "RequestError",
    "RequestTimeoutError",
    "ResponseError",
    "RetryPolicy",
    "Reward",
    "Rewards",
    "ServerError",
    "StatusError",
    "StorageFullError",
    "Stream",
    "StreamError",
    "Sweep",
    "SweepParams",
    "TaskResult",
    "Tenant",
    "TenoraError",
    "TrainingFileParams",
    "TransportError",
    "Trial",
    "UnavailableError",
    "UnprocessableError",
    "Usage",
    "WeightedAdapter",
    "__version__",
]
