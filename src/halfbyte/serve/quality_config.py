"""What is asked of everything around the model; the command line is made from the fields."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.config_fields import check_least, check_positive, check_share, option
from halfbyte.errors import ConfigError

CHECKS = ("empty", "repetition", "json", "language", "refusal")
"""What a monitor may find wrong with an answer by its text alone."""

CAUSES = ("critical", "error", "timeout", "overload", "confidence", *CHECKS)
"""Why a request may go on to the next model."""

USUAL_CAUSES = ("critical", "error", "timeout", "overload", "confidence", "empty", "repetition",
                "json")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig:
    """How answers are watched, and what happens when one is not good enough."""

    fallback: tuple[str, ...] = option(
        (),
        "a larger model that takes over: an OpenAI-compatible address up to /v1, or a folder; may "
        "be given again, for the next choice",
        metavar="URL",
    )
    fallback_on: tuple[str, ...] = option(
        USUAL_CAUSES,
        "when it takes over; may be given again (default: all but language and refusal; "
        "confidence only with --confidence)",
        choices=CAUSES,
    )
    hold_back: int = option(
        16,
        "tokens of a streamed answer that wait until it is sure that the model need not be "
        "changed; only where there is another; 0: none",
        metavar="N",
    )
    confidence: str | None = option(
        None, "thresholds written by `halfbyte serve calibrate`", metavar="FILE"
    )
    first_token_timeout: float = option(
        120.0, "seconds until the first token, waiting in line included", metavar="S"
    )
    idle_timeout: float = option(30.0, "seconds between two tokens", metavar="S")
    answer_timeout: float | None = option(
        None, "seconds for a whole answer from one model (default: no limit)", metavar="S"
    )
    retry_share: float = option(
        0.5,
        "failed requests may be sent on to another model up to this share of all requests",
        metavar="SHARE",
    )
    fallback_requests_per_minute: int | None = option(
        None, "budget of the larger model (default: no limit)", metavar="N"
    )
    fallback_requests_per_day: int | None = option(
        None, "budget of the larger model (default: no limit)", metavar="N"
    )
    fallback_tokens_per_minute: int | None = option(
        None, "budget of the larger model, prompt and answer (default: no limit)", metavar="N"
    )
    fallback_tokens_per_day: int | None = option(
        None, "budget of the larger model, prompt and answer (default: no limit)", metavar="N"
    )
    breaker_failures: int = option(
        5, "failures in a row after which a model is left alone for a while", metavar="N"
    )
    breaker_seconds: float = option(
        5.0, "that while; it doubles with every failed try, up to 16 times", metavar="S"
    )
    shadow: str | None = option(
        None,
        "a candidate that gets a copy of some requests; its answers are compared and thrown away",
        metavar="URL",
    )
    shadow_share: float = option(0.1, "of the requests", metavar="SHARE")
    canary: str | None = option(
        None,
        "a candidate that answers some requests until a sequential test promotes it or takes it "
        "back",
        metavar="URL",
    )
    canary_share: float = option(0.1, "of the requests", metavar="SHARE")
    canary_margin: float = option(
        0.02,
        "by how much more of its requests may fail than of the present model's, at most, for a "
        "promotion",
        metavar="SHARE",
    )
    canary_rating: bool = option(
        True,
        "the present model rates every answer of the trial, and one that it finds far less likely "
        "than its own counts as failed; where it can (echo with logprobs)",
        both=True,
    )
    canary_alpha: float = option(
        0.05, "chance of a wrong rollback, and of a wrong promotion, at most", metavar="P"
    )
    canary_requests: int = option(
        50_000, "without a decision after so many requests, it is taken back", metavar="N"
    )
    evidence: str | None = option(
        None,
        "folder for what canary and shadow found and fallback spent, as JSON; a restart goes on "
        "from there",
        metavar="DIR",
    )
    reference: str | None = option(
        None,
        "report.json of `halfbyte compare`: how long and how sure answers usually are",
        metavar="FILE",
    )
    probes: str | None = option(
        None, "task file of questions with known answers, asked again and again", metavar="FILE"
    )
    probe_minutes: float = option(10.0, "between two rounds of them", metavar="N")
    oracle: str | None = option(
        None,
        "the base model, which rates how likely it finds some of the answers: an address whose "
        "/completions knows echo and logprobs",
        metavar="URL",
    )
    oracle_share: float = option(0.01, "of the answers", metavar="SHARE")
    webhook: str | None = option(None, "gets every alert, as JSON by POST", metavar="URL")
    alert_share: float = option(
        0.2, "of the last answers that fail one check, for an alert", metavar="SHARE"
    )
    request_log: str | None = option(
        None,
        "SQLite file that every request and answer is written to, redacted (default: none)",
        metavar="FILE",
    )
    request_log_texts: bool = option(
        True, "keep the redacted texts, not only the figures", both=True
    )
    request_log_rows: int = option(
        1_000_000, "requests in the log; the oldest make room", metavar="N"
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
        unknown = [cause for cause in self.fallback_on if cause not in CAUSES]
        if unknown:
            raise ConfigError(f"fallback_on has {unknown[0]!r}; allowed are {', '.join(CAUSES)}.")
