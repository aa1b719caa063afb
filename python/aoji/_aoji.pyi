from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, TypedDict, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self, Unpack

__version__: str

class Options(TypedDict, total=False):
    """How tokens are chosen and when a text ends. Without any, the most likely token each time, until the model ends the text."""

    max_tokens: int | None
    """Most tokens; until the text ends or the context is full when absent."""
    temperature: float | None
    """Divides the logits; 0, the default, takes the most likely token."""
    top_k: int | None
    """Only so many of the most likely tokens; 0 is off."""
    top_p: float | None
    """Only the most likely tokens that together have this probability; 1 is off."""
    min_p: float | None
    """Only tokens with at least this share of the most likely one's probability; 0 is off."""
    repetition_penalty: float | None
    """Divides the logits of tokens in prompt and answer; 1 is off."""
    frequency_penalty: float | None
    """Taken from a token's logit for each time that it is in the answer."""
    presence_penalty: float | None
    """Taken from the logit of each token in the answer."""
    logit_bias: Mapping[int, float] | None
    """Added to the logits of single tokens; minus infinity forbids one."""
    seed: int | None
    """The same seed and prompt give the same text; 0 when absent."""
    min_tokens: int | None
    """The text does not end before so many tokens."""
    stop: str | Sequence[str] | None
    """Texts before which the text ends."""
    stop_ids: Sequence[int] | None
    """Tokens that end the text besides the model's own."""
    include_stop: bool | None
    """A text of `stop` that ends the text stays in it."""
    keep_special: bool | None
    """Special tokens appear in the text."""
    ignore_eos: bool | None
    """The model's own tokens do not end the text."""
    speculate: bool | Literal["ngram", "model", "off"] | None
    """The next tokens are guessed: by what was there before (True, "ngram") or by the engine's draft model ("model"). The text is the
    same and comes faster where guesses are right."""
    prediction: Sequence[int] | None
    """Tokens that may come, which are guesses too."""

class Message(TypedDict):
    role: str
    content: str

class Timings(TypedDict):
    prompt_tokens: int
    reused_tokens: int
    """Of these, the ones that the session held already."""
    tokens: int
    """Tokens of the answer, with the one that ended it."""
    drafted_tokens: int
    accepted_tokens: int
    prompt_seconds: float
    first_token_seconds: float
    decode_seconds: float
    tokens_per_second: float

@final
class Generation(Iterator[str]):
    """A text as it comes: an iterator of its pieces. The model computes at most a few tokens ahead of the reader."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> str: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None: ...
    def read(self) -> str:
        """All of the text, waiting for its end."""
    def close(self) -> None:
        """Ends it, as dropping it does."""
    @property
    def text(self) -> str:
        """The text so far."""
    @property
    def tokens(self) -> list[int]:
        """The tokens so far."""
    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """None as long as it has not ended by itself."""
    @property
    def timings(self) -> Timings | None:
        """After the end."""

@final
class Answer:
    """An answer of a batch."""

    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def finish_reason(self) -> Literal["stop", "length"] | None: ...
    @property
    def timings(self) -> Timings | None: ...

@final
class Score:
    """How likely a continuation is."""

    @property
    def logprob(self) -> float:
        """Natural logarithm of its probability."""
    @property
    def logprobs(self) -> list[float]:
        """The same of each of its tokens, given those before."""
    @property
    def greedy(self) -> bool:
        """Whether it is what the model itself would have written."""

@final
class Engine:
    """A loaded model, which any number of threads may use."""

    def __new__(
        cls,
        model: str = "demo",
        *,
        device: str = "auto",
        context: int | None = None,
        threads: int | None = None,
        activations: Literal["bf16", "f32"] = "bf16",
        sequences: int = 1,
        cache_tokens: int | None = None,
        kv: Literal["auto", "fp8"] = "auto",
        widen: bool = False,
        quantize: str | None = None,
        draft: str | None = None,
    ) -> Self:
        """Opens a model: a directory in Hugging Face layout, a GGUF file, OWNER/NAME of the local Hugging Face cache, or "demo".

        device: "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:N". context: most tokens of a session. threads:
        threads of the CPU. sequences: how many sequences a GPU reserves memory for: 1 for sessions, otherwise those of `batch`.
        cache_tokens: size of their common cache in tokens; by default a whole context for each, for at most 16. kv: how keys and values are stored; "fp8" takes half the
        memory of bf16 and loses some precision. widen: quantized weights become bf16 when they are loaded. quantize: a format in which
        weights are quantized while they are loaded, as of `aoji --quantize`. draft: a smaller model with the same vocabulary, for `speculate="model"`.
        """
    def chat(self, question: str | Sequence[Message], *, system: str | None = None, **options: Unpack[Options]) -> Generation:
        """Answers a question, or the last of some messages."""
    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Generation:
        """Continues a text, as it is but for BOS, or token ids."""
    def session(self, max_tokens: int | None = None, *, system: str | None = None) -> Session:
        """An empty session with room for so many tokens; as many as the model allows when absent."""
    def score(self, context: str | Sequence[int], continuations: Sequence[str] | Sequence[Sequence[int]], *, bos: bool = True) -> list[Score]:
        """How likely each continuation is. Texts are divided into tokens as lm-evaluation-harness does, with the model's BOS in
        front if `bos`."""
    def batch(self, prompts: Sequence[str | Sequence[int]], *, sequences: int = 8, cache_tokens: int | None = None, **options: Unpack[Options]) -> list[Answer]:
        """Continues several prompts, so many at a time (up to 64), with memory for the keys and values of `cache_tokens`. Each result
        is the same whatever runs beside it."""
    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Tokens of a text. With `special` the text of a special token becomes that token; with `bos` the model's BOS is first."""
    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens, with special ones if `special`."""
    def prompt(self, question: str | Sequence[Message], *, system: str | None = None) -> list[int]:
        """Tokens of the prompt that asks a question, or for the answer to the last of some messages."""
    @property
    def recommended(self) -> Options:
        """What the model's author recommends, for `engine.chat(.., **engine.recommended)`."""
    @property
    def vocab(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def is_gpu(self) -> bool: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> list[int]: ...

@final
class Session:
    """One timeline of tokens with its KV cache, and a conversation. A call on it ends a generation that still runs in it."""

    def chat(self, text: str, **options: Unpack[Options]) -> Generation:
        """The next question of the conversation; the answer is added to `messages` as far as it was read."""
    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Generation: ...
    def sync(self, prompt: str | Sequence[int]) -> int:
        """Makes the timeline equal to a text or token ids; how many tokens did not have to be computed."""
    def step(self, token: int) -> None:
        """Adds a token to the timeline."""
    def logits(self) -> NDArray[np.float32]:
        """The logits after the last token, one for each token of the vocabulary."""
    def score(self, prefix: str | Sequence[int], continuations: Sequence[str | Sequence[int]]) -> list[Score]:
        """How likely each continuation is after a prefix, which is computed once; texts of continuations get nothing added."""
    @property
    def messages(self) -> list[Message]: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def max_tokens(self) -> int: ...

class AojiError(Exception):
    """What aoji could not do; the others are kinds of it."""

class InputError(AojiError): ...
class ContextError(AojiError): ...
class NoModelError(AojiError): ...
class FileError(AojiError): ...
class UnsupportedError(AojiError): ...
class DeviceMemoryError(AojiError): ...
class NoGpuError(AojiError): ...
class CudaError(AojiError): ...
