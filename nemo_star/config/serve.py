"""Keys of `nemo-star serve`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from nemo_star.config.generate import InferenceConfig
from nemo_star.config.llm import LLMConfig


@dataclass(frozen=True)
class ServerConfig:
    """The address, who may ask, and how much."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine only."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, and says which."""
    api_keys_file: str | None = None
    """File of bearer tokens, one a line; each sees its own contexts only. None: nobody is asked for one."""
    model_name: str | None = None
    """What requests call the model; None: the name of the checkpoint's folder."""
    max_waiting: int = 256
    """Requests that wait for their turn, of all keys; one more is refused (429)."""
    max_requests_per_key: int = 128
    """Requests of one key that wait or are under way; one more is refused (429)."""
    max_contexts_per_key: int = 1000
    """Named contexts of one key; one more is refused (429)."""
    max_body_mib: float = 64.0
    """Size of a request in MiB; a larger one is refused (413)."""
    max_context_tokens: int | None = None
    """Longest context; None: as long as the model was trained for. A longer one is refused (413)."""
    max_query_tokens: int = 8192
    """Longest query: what comes after the context is computed in one piece. A longer one is refused (413)."""
    max_completion_tokens: int = 16384
    """No request may ask for a longer answer (400)."""
    max_encodings: int = 2
    """Contexts encoded by turns, so that a short one need not wait for a long one."""
    body_seconds: float = 60.0
    """A request's headers, and then its body, must have come within this time (408); a client that reads nothing of its
    answer for so long is left."""
    request_seconds: float = 3600.0
    """A request that has taken longer, waiting included, ends with an error (504)."""
    keepalive_seconds: float = 10.0
    """In a stream, a comment is sent when nothing else was for so long."""
    drain_seconds: float = 25.0
    """After SIGTERM, requests under way have this long to end; torchrun kills after 30 seconds."""
    context_ttl_seconds: float | None = None
    """A named context that nobody has used for so long is deleted; None: never. A request may say otherwise."""
    log_text: bool = False
    """Write queries and answers into the log, too."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"server.port={self.port} must be at least 0 and below {2**16}")
        for key in fields(self):
            value = getattr(self, key.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0 and key.name != "port":
                raise ValueError(f"server.{key.name}={value} must be above 0")
        if self.model_name == "":
            raise ValueError("server.model_name is empty")


@dataclass(frozen=True)
class ServeConfig(LLMConfig):
    """All keys of `nemo-star serve`."""

    inference: InferenceConfig = field(default_factory=InferenceConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
