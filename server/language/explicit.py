"""Explicit requests about the reply's language, in either language, as against a mere mention of a language.

Every name of a language is judged by what stands before and after it in its sentence: "answer in Arabic" asks,
"a good book in Arabic" mentions.
"""

import re

from server.language import Language

_NAME = re.compile(
    # What leads into the name, in Latin or Arabic letters, is part of the phrase.
    r"(?P<lead>\b(?:in|into|to|using|bel|bil|bl|be|b)[\s-]*(?:the\s+)?|(?:في|الي)\s+|(?<!\w)(?:باللغه|اللغه|بلغه|للغه|لغه)\s+)?"
    r"(?P<stem>(?<!\w)(?:بال|ب|لل|ل|ال)?)"
    r"(?:(?P<ar>(?:ال)?عربي[اه]?(?!\w)|\b(?:arabic|(?:b[ei]?l?)?3arab[iy])\b)"
    r"|(?P<en>(?:ال)?(?:انجليزي|انكليزي|انقليزي|انجليزى)[اه]?(?!\w)|(?:ال)?(?:انجلش|انكلش|انقلش)(?!\w)"
    r"|\b(?:english|inglizi|englizi|ingilizi|englisi|inglisi|ingles[ie])\b))"
    r"(?:\s+language)?"
)
# Part of every name above, and quicker to look for.
_HINTS = ("arab", "عربي", "engl", "ngli", "ngles", "نجليزي", "نكليزي", "نقليزي", "انجلش", "انكلش", "انقلش")
_SENTENCE_END = re.compile(r"[.!?؟;؛\n]")

_ENGLISH_VERBS = (
    r"(?:answer|anwser|awnser|reply|respond|explain|describe|summari[sz]e|translate|tell|write|generate|compose|create"
    r"|draft|identify|list|provide|produce|output|present|return|discuss|outline|extract|suggest|advise|turn|speak|talk"
    r"|chat|communicate|converse|continue|keep|stick|go|switch|change|use|repeat|rephrase|give|say\s+(?:it|that|this)"
    r"|put\s+(?:it|that)|do\s+(?:it|that))"
)
_ARABIC_VERBS = (
    r"(?:اجب|اجيب|اجيبي|اجبني|اجيبني|جاوب|جاوبي|جاوبني|جاوبيني|رد|ردي|ردوا|تجاوب|تجاوبي|تجاوبني|تجيب|تجيبي|تجيبني"
    r"|ترد|تردي|تردوا|تكلم|تكلمي|كلمني|كلميني|اتكلم|تتكلم|تتكلمي|تكلمني|احك|احكي|احكيلي|تحكي|تحكيلي|حاكيني|تحدث|تتحدث"
    r"|اكتب|اكتبي|اكتبلي|تكتب|تكتبلي|اشرح|اشرحي|اشرحلي|تشرح|تشرحي|تشرحلي|وضح|توضح|فسر|تفسر|خاطبني|تخاطبني|استخدم"
    r"|استعمل|تستخدم|قل|قول|قولي|قلي|تقول|تقولي|خبرني|تخبرني|اخبرني|واصل|تواصل|نواصل|كمل|كملي|تكمل|نكمل|نتكلم|نحكي"
    r"|نتحدث|حول|تحول|غير|تغير|بدل|اعطني|اعطيني|عطني|عطيني|تعطيني|اديني|تديني|ترجم|ترجمي|ترجملي|تترجم|لخص|تلخص|الرد"
    r"|الاجابه|الجواب|الشرح|ردك|ردودك|اجابتك|اجاباتك|جوابك)"
)
_ARABIZI_VERBS = (
    r"(?:jaweb|jawbni|jawebni|rod|rodd|rid|7ki|e7ki|i7ki|e7kili|tkallam|kallemni|kalemni|etkalem|ektob|ishra7|eshra7)"
)
# What may stand before the verb of somebody who asks us. A subject of its own ("my kids", "الدكتور") may not.
_CUES = (
    r"(?:^|[,،:()\[\]\"“«–-]|\b(?:please|pls|plz|kindly|(?<!do )(?:you|u)(?:\s+to)?|can\s+we|could\s+we|shall\s+we"
    r"|may\s+we|let'?s|let\s+us|want\s+to|like\s+to|prefer\s+to|rather|just|only|always|now|so|ok|okay|doctor|dr|hi|hello"
    r"|better|sure\s+to|remember\s+to|don'?t|do\s+not|never|not|stop)"
    r"|(?<!\w)(?:ممكن|رجاء|الرجاء|يرجي|ارجو|ارجوك|منك|فضلك|سمحت|سمحتي|تقدر|تقدري|بتقدر|فيك|فيكي|يمكن|يمكنك|هل|بدي"
    r"|اياك|اريد|اريدك|نريد|ابغي|ابغاك|ابي|ابيك|عايز|عايزك|عاوز|عاوزك|حابب|احب|افضل|بفضل|اود|ان|خلينا|دعنا|خلنا|طيب"
    r"|اوك|اوكي|دكتور|الان|لازم|يجب|احتاج|محتاج|ياريت|ريت|بليز|لا|ما|مو|مش|بدون))"
)
# No two alternatives inside a repetition may match the same words: backtracking would double with each of them.
_ADVERBS = r"(?:(?:please|just|always|now|also|then|[a-z]+ly|لي|علي|هلا|الان|دايما|فقط)\s+)*"
_VERB = re.compile(
    rf"(?:{_CUES}\s*{_ADVERBS}"
    r"|\band\s+(?=answer|reply|respond|explain|tell|translate|summari|write|generate|give|list|keep)|(?<!\w)و(?=ا))"
    rf"(?:{_ENGLISH_VERBS}|{_ARABIC_VERBS}|{_ARABIZI_VERBS})(?!\w)[^\n]{{0,150}}$"
    rf"|^\W*{_ARABIZI_VERBS}\b"
)
_STOPPED = re.compile(
    r"(?:\b(?:don'?t|do\s+not|never|not|stop)|(?<!\w)(?:لا|مو|مش|بدون))\s+"
    r"(?:please\s+|to\s+|just\s+|want\s+you\s+to\s+)*"
    rf"(?:{_ENGLISH_VERBS}(?:ing)?|using|writing|{_ARABIC_VERBS})(?!\w)[^\n]{{0,40}}$"
)
_REPLIES = r"(?:answers?|reply|replies|responses?|explanations?|summary|summaries|output)"
_WISH = re.compile(
    r"\b(?:i|we|i'?d|we'?d|would)\s+(?:(?:would|really|much)\s+)*(?:prefer|rather|like|want|need|love)\s+"
    rf"(?:(?:it|that|this|to|the|your|an?|{_REPLIES}|talk|speak|chat|be|read|get|have|receive|communicate|continue|use"
    r"|you|my|please)\s+)*$"
    r"|\b(?:should|must|will|to|and)\s+be\s+(?:written|given|answered|phrased)\s+$"
    r"|^\W*(?:preferably|prefer)\s+$"
    rf"|\b(?:(?:your|the|all|every|each|any)\s+(?:\w+\s+)?|(?:an?|my|get|have)\s+){_REPLIES}\s+(?:\w+\s+){{0,4}}$"
    r"|(?<!\w)(?:افضل|بفضل)\s+$"
)
# A name without "in" is an adjective before other words: "I need an Arabic doctor".
_NOT_BEFORE_NOUN = re.compile(r"\s*(?:$|[^\sa-z]|(?:if|for|because|since|and|but|so|when|over|from|as|to|not|is)\b)")
# Nouns and clauses that own the language: the word, the leaflet, the nurse, not the reply.
_OWNED = re.compile(
    r"\b(?:the|its|their)\s+(?:medical\s+|scientific\s+|generic\s+|exact\s+|right\s+)?(?:word|name|term)s?\b"
    r"|\b(?:is|was|are|were|it's|report|letter|label|note|notes|box|form|paper|results?|prescription)\s+"
    r"(?:\w+\s+)?(?:written|printed)\b"
    r"|\b(?:books?|sites?|websites?|leaflets?|videos?|channels?|who|nurse|mother|mom|wife|husband|family)\b"
    r"|\bhow\s+(?:to|do|can|would|should)\s+(?:i\s+|you\s+|we\s+)?(?:say|spell|write|tell|explain)\b"
    r"|(?<!\w)(?:كلمه|كلمات|اسم|اسمه|اسمها|كتاب|كتب|موقع|مواقع|فيديو|فيديوهات|مصطلح|مكتوب|مكتوبه|ترجمتها|ترجمته|ترجمه"
    r"|معني)(?!\w)"
)
_NOT_THE_LANGUAGE = re.compile(
    r"[\s-]*(?:speaking|countr|newspaper|coffee|food|medicine|culture|tradition|world|book|website|channel|article|class|school"
    r"|course|name|word|term|breakfast|patients|gum)"
)
_POLITE = (
    r"(?:please|pls|plz|only|now|instead|thanks|thank\s+you|if\s+(?:possible|you\s+can)|(?:لو|اذا)\s+سمحتي?|من\s+فضلك"
    r"|رجاء|بليز|فقط|بس|شكرا|يا\s+ريت|ياريت|ممكن)"
)
_POLITE_WORD = re.compile(
    "(?:please|pls|plz|only|now|instead|thanks|thank|you|if|possible|can|ok|okay|and|but|so|the|rest|لو|اذا|سمحتي?|من|فضلك"
    "|رجاء|بليز|فقط|بس|شكرا|يا|ريت|ياريت|ممكن|اوك|اوكي|هلا|طيب|خليها|خلينا|خليه|خلها|احكي)"
)
_POLITE_AFTER = re.compile(rf"[\s,،]*(?:{_POLITE}[\s,،]*)*(?:$|[.!?؟;؛\n):\]،,–-])")
_PLEASE_AFTER = re.compile(
    r"[\s,،]*(?:please|pls|plz|if\s+(?:possible|you\s+can)|(?:لو|اذا)\s+سمحت|من\s+فضلك|بليز|رجاء)"
)
_BREAK = re.compile('[,،:()\\[\\]"“«–-]')


def requested_language(text: str) -> Language | None:
    """Return the language that `text` asks the reply to be in, or None. `text` is spelled as `resolve.plain` does."""
    if not any(hint in text for hint in _HINTS):
        return None
    asked: Language | None = None
    shunned: Language | None = None
    start = 0
    for name in _NAME.finditer(text):
        language: Language = "ar" if name["ar"] else "en"
        before = _SENTENCE_END.split(text[start : name.start()][-200:])[-1]
        after = text[name.end() : name.end() + 40]
        start = name.end()
        if _OWNED.search(before) or _NOT_THE_LANGUAGE.match(after):
            continue
        if _STOPPED.search(before):
            shunned = language
        elif _asks(before, bool(name["lead"] or name["stem"] in ("ب", "بال", "لل")), after):
            asked = language
    if asked is None and shunned is not None:
        return "en" if shunned == "ar" else "ar"
    return asked


def _asks(before: str, led: bool, after: str) -> bool:
    """Whether a name of a language is about the reply, given its sentence up to it and what follows it.

    `led` tells a phrase ("in Arabic", "بالعربي") from a bare name ("Arabic").
    """
    if _VERB.search(before):
        return True
    if _WISH.search(before) and (led or _NOT_BEFORE_NOUN.match(after)):
        return True
    if _only_polite(before) and _POLITE_AFTER.match(after):
        return led or not after.strip(" .!?؟)") or bool(_PLEASE_AFTER.match(after))
    if not led:
        return False
    set_off = _only_polite(_BREAK.split(before)[-1]) and _POLITE_AFTER.match(after)
    return bool(set_off or _PLEASE_AFTER.match(after) or (before.strip() and _only_polite(before)))


def _only_polite(text: str) -> bool:
    return all(_POLITE_WORD.fullmatch(word) for word in re.findall(r"\w+", text))
