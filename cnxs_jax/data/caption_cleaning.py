"""PixArt's caption cleaning: what its models saw in training, and what diffusers does by default.

The rules and their order are DeepFloyd IF's (`T5Embedder.clean_caption`), which PixArt took over;
they run twice. Two steps use the standard library: tags are dropped by `html.parser` (Beautiful
Soup there), and text is NFC-normalised, without ftfy's repair of mojibake. Captions are capped
before any pattern runs, so that no caption can make the patterns slow.
"""

import html
import html.parser
import re
import unicodedata
import urllib.parse

from cnxs_jax.data import text

_SITE = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = "-֊־᐀᠆‐-―⸗⸚⸺⸻⹀〜〰゠︱︲﹘﹣－"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"


def _rules(*rows):
    return [(re.compile(pattern), replacement) for pattern, replacement in rows]


BEFORE_TAGS = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
)
AFTER_TAGS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[㇀-ㇿ㈀-䷿一-鿿]+", ""),  # CJK strokes, enclosed forms, ideographs
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"(?<!\S)\S+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
AFTER_ESCAPES = _rules(
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # product codes: jc6640
    (r"\b[a-z]+\d+[a-z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 640x480, with the Cyrillic letter too
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


class _Text(html.parser.HTMLParser):
    """Collects what is not a tag."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts = []
        self.handle_data = self.parts.append


def _without_tags(caption):
    parser = _Text()
    parser.feed(caption)
    parser.close()
    return "".join(parser.parts)


def _apply(rules, caption):
    for pattern, replacement in rules:
        caption = pattern.sub(replacement, caption)
    return caption


def _clean_once(caption):
    caption = urllib.parse.unquote_plus(caption).strip().lower()
    caption = _without_tags(_apply(BEFORE_TAGS, caption))
    caption = _apply(AFTER_TAGS, caption)
    if len(re.findall("[-_]", caption)) > 3:  # this-is-my-cute-cat
        caption = re.sub("[-_]", " ", caption)
    caption = html.unescape(html.unescape(unicodedata.normalize("NFC", caption)))
    return _apply(AFTER_ESCAPES, caption).strip()


def clean_caption(caption):
    """The caption as PixArt's text encoder got it: lower case, no links, codes, tags, ideographs.

    Raises:
        errors.ConfigError: no str, or longer than 2000 characters.
    """
    text.check_caption(caption)
    return _clean_once(_clean_once(caption))


def tokenize(tokenizer, captions, max_length=text.MAX_LENGTH):
    """`text.tokenize` of cleaned captions: what PixArt reads, in training and when it draws."""
    captions = [captions] if isinstance(captions, str) else captions
    return text.tokenize(tokenizer, [clean_caption(c) for c in captions], max_length)
