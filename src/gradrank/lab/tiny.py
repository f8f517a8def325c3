"""Tiny models with seeded random weights and a byte-level tokenizer, built from code.

They need no file and no network: for tests, for the documentation's examples and for trying the
command line in seconds. They have learnt nothing.
"""

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
)

SPECIAL = ("<pad>", "<eos>", "<cls>", "<sep>")
VOCABULARY = 256 + len(SPECIAL)
POSITIONS = 128
IMAGE_SIZE = 16
# Ten times the usual spread: frozen weights as small as usual would leave an adapter nothing to
# work with, and every loss would stay where it began.
SPREAD = 0.2


def byte_tokenizer(markers: bool = False) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte of UTF-8.

    Args:
        markers: Whether each text becomes ``<cls> text <sep>``, and a pair ``<cls> text <sep> text
            <sep>``, as a BERT classifier expects.

    Returns:
        The tokenizer: ids 0..3 are the special tokens, then the 256 bytes.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if markers:
        core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<cls> $A <sep>",
            pair="<cls> $A <sep> $B:1 <sep>:1",
            special_tokens=[("<cls>", 2), ("<sep>", 3)],
        )
    kinds = ["token_type_ids"] if markers else []
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", *kinds, "attention_mask"],
        pad_token="<pad>",
        eos_token="<eos>",
        cls_token="<cls>",
        sep_token="<sep>",
    )


def image_processor() -> ViTImageProcessorPil:
    """Return the image processor of ``tiny-vit``: 16 x 16 pixels, values in [-1, 1]."""
    return ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def _llama() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        initializer_range=SPREAD,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def _gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY,
        initializer_range=SPREAD,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def _bert() -> PreTrainedConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        initializer_range=SPREAD,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
    )


def _vit() -> PreTrainedConfig:
    return ViTConfig(
        initializer_range=SPREAD,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=IMAGE_SIZE,
        patch_size=4,
    )


TINY_MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny-llama": _llama,
    "tiny-gpt2": _gpt2,
    "tiny-bert": _bert,
    "tiny-vit": _vit,
}
