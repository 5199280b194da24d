"""An adversarial trial of the language policies on a running service: conversations that pull towards the wrong
language, replied to under `off`, `guide` and `guard`, and scored; and terms that Arabic replies must be able to name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Literal, NamedTuple

from server.language import Language
from server.language.score import PassRates, judge, pass_rates

Policy = Literal["off", "guide", "guard"]
POLICIES: tuple[Policy, ...] = ("off", "guide", "guard")
EXPECTED: tuple[Language, ...] = ("en", "ar")
REPLY_TOKENS = 128
AT_ONCE = 16

CONDITIONS: tuple[dict[Language, str], ...] = (
    {"en": "migraine", "ar": "الصداع النصفي"},
    {"en": "epilepsy", "ar": "الصرع"},
    {"en": "insomnia", "ar": "الأرق"},
    {"en": "depression", "ar": "الاكتئاب"},
    {"en": "acid reflux", "ar": "الارتجاع المريئي"},
    {"en": "food poisoning", "ar": "التسمم الغذائي"},
    {"en": "gallstones", "ar": "حصوات المرارة"},
    {"en": "appendicitis", "ar": "التهاب الزائدة الدودية"},
    {"en": "high blood pressure", "ar": "ارتفاع ضغط الدم"},
    {"en": "heart failure", "ar": "قصور القلب"},
    {"en": "type 2 diabetes", "ar": "السكري من النوع الثاني"},
    {"en": "influenza", "ar": "الإنفلونزا"},
    {"en": "pneumonia", "ar": "الالتهاب الرئوي"},
    {"en": "asthma", "ar": "الربو"},
    {"en": "eczema", "ar": "الإكزيما"},
    {"en": "low back pain", "ar": "ألم أسفل الظهر"},
    {"en": "gout", "ar": "النقرس"},
)
QUESTIONS: tuple[dict[Language, str], ...] = (
    {"en": "What is {}?", "ar": "ما هو {}؟"},
    {"en": "What are the symptoms of {}?", "ar": "ما أعراض {}؟"},
    {"en": "How can I treat {} at home?", "ar": "كيف أعالج {} في المنزل؟"},
    {"en": "When should I see a doctor about {}?", "ar": "متى يجب أن أراجع الطبيب بسبب {}؟"},
)
REPLIES: dict[Language, str] = {
    "en": "It is a common condition. Rest, drink enough water and talk to your doctor if it gets worse.",
    "ar": "إنها حالة شائعة. استرح واشرب ما يكفي من الماء وراجع طبيبك إذا ساءت الأعراض.",
}
WISHES: dict[Language, str] = {"en": "Please answer in English only.", "ar": "أجب باللغة العربية فقط من فضلك."}


class Case(NamedTuple):
    """A conversation, what the request says about the reply's language, and the language that the reply must have."""

    messages: list[dict[str, str]]
    language: Literal["auto", "en", "ar"]
    expected: Language


def cases(expected: Language) -> Iterator[Case]:
    """204 conversations: the question in the other language; the same with a wish for that language in its text, which
    the request overrules; and a switch to the expected language after two turns in the other."""
    other: Language = "ar" if expected == "en" else "en"
    for condition, question in product(CONDITIONS, QUESTIONS):
        asked = question[other].format(condition[other])
        yield Case([_says("user", asked)], expected, expected)
        yield Case([_says("user", f"{asked} {WISHES[other]}")], expected, expected)
        history = [_says("user", asked), _says("assistant", REPLIES[other])]
        yield Case([*history, _says("user", question[expected].format(condition[expected]))], "auto", expected)


def _says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class Outcome(NamedTuple):
    """What one policy gave for one expected language."""

    policy: Policy
    expected: Language
    rates: PassRates
    tokens_per_second: float


async def run(url: str, api_key: str, advance: Callable[[], None]) -> list[Outcome]:
    """Try every policy on the service at `url`; `advance` is called after each reply. Raises openai.OpenAIError."""
    from openai import AsyncOpenAI

    outcomes = []
    async with AsyncOpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=api_key, timeout=600) as client:
        model = (await client.models.list()).data[0].id
        for policy, expected in product(POLICIES, EXPECTED):
            outcomes.append(await _try(client, model, policy, expected, advance))
    return outcomes


async def _try(client: Any, model: str, policy: Policy, expected: Language, advance: Callable[[], None]) -> Outcome:
    free = asyncio.Semaphore(AT_ONCE)

    async def reply(number: int, case: Case) -> tuple[str, int]:
        async with free:
            answer = await client.chat.completions.create(
                model=model,
                messages=case.messages,
                max_tokens=REPLY_TOKENS,
                seed=number,
                extra_body={"language": case.language, "language_policy": policy},
            )
        advance()
        return answer.choices[0].message.content or "", answer.usage.completion_tokens

    began = time.perf_counter()
    replies = await asyncio.gather(*(reply(number, case) for number, case in enumerate(cases(expected))))
    seconds = time.perf_counter() - began
    rates = pass_rates(judge(text, expected) for text, _ in replies)
    return Outcome(policy, expected, rates, sum(tokens for _, tokens in replies) / seconds)


# --- required terms ---------------------------------------------------------------------------------------------

TERMS = (
    "Panadol", "paracetamol", "ibuprofen", "Aspirin", "metformin", "insulin glargine", "Augmentin", "amoxicillin",
    "amoxicillin/clavulanic acid", "azithromycin", "ciprofloxacin", "omeprazole", "Nexium", "atorvastatin",
    "Lipitor", "amlodipine", "lisinopril", "losartan", "hydrochlorothiazide", "furosemide", "warfarin",
    "rivaroxaban", "clopidogrel", "levothyroxine", "prednisolone", "methotrexate", "salbutamol", "Ventolin",
    "montelukast", "loratadine", "Voltaren", "diclofenac", "tramadol", "gabapentin", "sertraline", "fluoxetine",
    "acetylsalicylic acid", "folic acid", "ferrous sulfate", "vitamin B12", "vitamin D3", "HbA1c", "MRI", "CT scan",
    "ECG", "CBC", "LDL", "TSH", "INR", "PCR", "COPD", "HIV", "HPV", "COVID-19", "ADHD", "IBS", "GERD", "G6PD",
    "BMI", "mg/dL", "mmHg", "H. pylori", "E. coli", "SpO2",
)  # fmt: skip
SENTENCES = (
    "يمكنك تناول {} مرتين يوميا بعد الأكل.",
    "نعم، {} مناسب لك.",
    "تحدث مع طبيبك أولا.\nقد يطلب منك الطبيب {} خلال أسبوع.",
    "ما يعرف باسم ({}) شائع.",
)
"""Arabic replies that name a term: later in a sentence, after one word, on a second line, in brackets."""


def allowed_terms(tokenizer: Any) -> dict[str, bool]:
    """For each of TERMS, whether the guard lets it be named in every one of SENTENCES, decoded by force."""
    from server.language.guard import Tables, first_refused
    from server.language.token_classes import read_vocabulary

    tables = Tables(read_vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id]))

    def passes(reply: str) -> bool:
        tokens = tokenizer.encode(f" {reply}{tokenizer.eos_token}", add_special_tokens=False)
        return first_refused(tables, "ar", tokens) is None

    return {term: all(passes(sentence.format(term)) for sentence in SENTENCES) for term in TERMS}
