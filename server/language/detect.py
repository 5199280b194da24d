"""The one place that talks to langdetect: whole sentences in a script that several languages share.

On short or mixed text langdetect guesses, so callers ask only when letters and common words do not decide.
"""

from functools import lru_cache
from pathlib import Path

from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
from langdetect.lang_detect_exception import LangDetectException

_LONGEST = 400  # characters looked at: more changes no answer and costs time


def load() -> None:
    """Load langdetect's profiles (about 0.3 s). Call at service start; the first `detect` does it otherwise."""
    _factory()


@lru_cache(maxsize=1024)
def detect(text: str) -> str | None:
    """Return the likeliest language of `text` as an ISO 639-1 code, or None where there are no letters to judge by.

    Deterministic: its random trials start from a fixed seed, set on a private factory.
    """
    detector = _factory().create()
    detector.append(text[:_LONGEST])
    try:
        return str(detector.detect())
    except LangDetectException:
        return None


@lru_cache(maxsize=1)
def _factory() -> DetectorFactory:
    factory = DetectorFactory()
    # Sorted, because the order of the profiles is part of what the seed makes repeatable, and listdir has none.
    profiles = sorted(Path(PROFILES_DIRECTORY).iterdir())
    factory.load_json_profile([profile.read_text(encoding="utf-8") for profile in profiles if profile.is_file()])
    factory.set_seed(0)
    return factory
