"""Settings for fallback, monitoring and rollouts; the fields become command line options."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.config_fields import check_least, check_positive, check_share, option
from halfbyte.errors import ConfigError
from halfbyte.serve.config import is_http_address

CHECKS = ("empty", "repetition", "json", "language", "refusal")
"""Checks of an answer's text."""

CAUSES = ("critical", "error", "timeout", "overload", "confidence", *CHECKS)
"""Causes for a fallback to the next model."""

USUAL_CAUSES = ("critical", "error", "timeout", "overload", "confidence", "empty", "repetition",
                "json")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig:
    """How answers are monitored, and what happens if a model fails."""

    fallback: tuple[str, ...] = option(
        (),
        "a larger model to fall back to: an OpenAI-compatible address up to /v1, or a folder; may "
        "be repeated, to be asked in this order",
        metavar="URL",
    )
    fallback_on: tuple[str, ...] = option(
        USUAL_CAUSES,
        "cause for a fallback; may be repeated (default: all but language and refusal; confidence "
        "only with --confidence)",
        choices=CAUSES,
    )
    hold_back: int = option(
        16,
        "tokens of a streamed answer that are buffered and checked before the client gets the "
        "first one, if there is a fallback model; 0: none",
        metavar="N",
    )
    confidence: str | None = option(
        None, "confidence threshold, written by `halfbyte serve calibrate`", metavar="FILE"
    )
    first_token_timeout: float = option(
        120.0, "timeout for the first token in seconds, including time in the queue", metavar="S"
    )
    idle_timeout: float = option(30.0, "timeout between two tokens in seconds", metavar="S")
    answer_timeout: float | None = option(
        None, "timeout for a whole answer from one model in seconds (default: none)", metavar="S"
    )
    retry_share: float = option(
        0.5,
        "maximum retries on another model, as a share of all requests",
        metavar="SHARE",
    )
    fallback_requests_per_minute: int | None = option(
        None, "maximum requests to fallback models per minute (default: no limit)", metavar="N"
    )
    fallback_requests_per_day: int | None = option(
        None, "maximum requests to fallback models per day (default: no limit)", metavar="N"
    )
    fallback_tokens_per_minute: int | None = option(
        None,
        "maximum prompt and completion tokens of fallback models per minute (default: no limit)",
        metavar="N",
    )
    fallback_tokens_per_day: int | None = option(
        None,
        "maximum prompt and completion tokens of fallback models per day (default: no limit)",
        metavar="N",
    )
    breaker_failures: int = option(
        5, "consecutive failures after which a model gets no requests for a while", metavar="N"
    )
    breaker_seconds: float = option(
        5.0,
        "length of that pause in seconds; it doubles each time the model fails again, up to 16 "
        "times",
        metavar="S",
    )
    shadow: str | None = option(
        None,
        "a candidate that gets a copy of some requests; its answers are compared and discarded",
        metavar="URL",
    )
    shadow_share: float = option(0.1, "share of the requests that are copied", metavar="SHARE")
    canary: str | None = option(
        None,
        "a candidate that answers some requests until a sequential test promotes it or rolls it "
        "back",
        metavar="URL",
    )
    canary_share: float = option(
        0.1, "share of the requests that the candidate answers", metavar="SHARE"
    )
    canary_margin: float = option(
        0.02,
        "maximum difference between the candidate's failure rate and the present model's for a "
        "promotion",
        metavar="SHARE",
    )
    canary_rating: bool = option(
        True,
        "let the present model rate every answer of the trial; one that it finds far less likely "
        "than its own counts as failed. Needs echo with logprobs",
        both=True,
    )
    canary_alpha: float = option(
        0.05, "maximum probability of a wrong rollback, and of a wrong promotion", metavar="P"
    )
    canary_requests: int = option(
        50_000, "requests after which a candidate is rolled back without a decision", metavar="N"
    )
    evidence: str | None = option(
        None,
        "folder for the state of canary, shadow and fallback budget, as JSON; a restart resumes "
        "from it",
        metavar="DIR",
    )
    reference: str | None = option(
        None,
        "report.json of `halfbyte compare`: the reference for drift of lengths and entropies",
        metavar="FILE",
    )
    probes: str | None = option(
        None, "task file of questions with known answers, asked regularly", metavar="FILE"
    )
    probe_minutes: float = option(10.0, "minutes between two rounds of probes", metavar="N")
    oracle: str | None = option(
        None,
        "the base model, which rates how likely it finds some of the answers: an address whose "
        "/completions supports echo and logprobs",
        metavar="URL",
    )
    oracle_share: float = option(0.01, "share of the answers that it rates", metavar="SHARE")
    webhook: str | None = option(
        None, "address to which every alert is posted as JSON", metavar="URL"
    )
    alert_share: float = option(
        0.2, "share of recent answers failing a check that raises an alert", metavar="SHARE"
    )
    request_log: str | None = option(
        None,
        "SQLite file to which requests and answers are written, redacted (default: none)",
        metavar="FILE",
    )
    request_log_texts: bool = option(True, "log the redacted texts, not only numbers", both=True)
    request_log_rows: int = option(
        1_000_000, "requests kept in the log; the oldest are deleted", metavar="N"
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("hold_back", 0),
            ("breaker_failures", 1),
            ("canary_requests", 1),
            ("request_log_rows", 1),
        ):
            check_least(self, name, least)
        for name in ("requests_per_minute", "requests_per_day", "tokens_per_minute"):
            check_least(self, f"fallback_{name}", 0)
        check_least(self, "fallback_tokens_per_day", 0)
        for name in ("first_token_timeout", "idle_timeout", "answer_timeout", "breaker_seconds",
                     "probe_minutes"):  # fmt: skip
            check_positive(self, name)
        check_share(self, "retry_share")
        for name in ("shadow_share", "oracle_share", "alert_share"):
            check_share(self, name, above_0=True)
        for name in ("canary_share", "canary_margin", "canary_alpha"):
            check_share(self, name, above_0=True, below_1=True)
        if self.webhook is not None and not is_http_address(self.webhook):
            raise ConfigError(
                f"webhook is '{self.webhook}'; it must be an address such as https://host/path."
            )
        unknown = [cause for cause in self.fallback_on if cause not in CAUSES]
        if unknown:
            raise ConfigError(f"fallback_on has {unknown[0]!r}; allowed are {', '.join(CAUSES)}.")
