"""A tokenizer in the manner of SentencePiece, as Llama's and Mixtral's."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<unk>")
WORDS = ("\u2581the", "the", "\u2581world", "\u2581Hello", "Hello", "\u2581return", "\u2581")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space before them as one token, letters, and bytes for all else.

    Texts begin with <s>. A space before a text's first word is added, and left out when decoding.
    """
    letters = [chr(code) for code in range(0x21, 0x7F)]
    pieces = [(name, 0.0) for name in SPECIAL]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [(word, -2.0) for word in WORDS] + [(letter, -3.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
