"""Generation: every way to decode gives the tokens of repeated full forwards."""

import logging
from itertools import product

import pytest
import torch
from test_modeling import VARIANTS, build, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerFast, pipeline, set_seed

from blueberry import BlueberryForCausalLM

GREEDY = {"do_sample": False, "max_new_tokens": 8}
NO_END = {"eos_token_id": -1, "pad_token_id": 0}  # continuous batching wants them given
# without sizes transformers reserves most of the memory
SMALL_PAGES = ContinuousBatchingConfig(page_size=32, num_blocks=8, max_batch_tokens=64)


def writer(variant: str = "experts", seed: int = 0, **overrides) -> BlueberryForCausalLM:
    """A model that hardly repeats itself: an untied head does not favour the token it has just read."""
    return build(variant, seed, tie_word_embeddings=False, **overrides)


def argmax_repeatedly(model: BlueberryForCausalLM, ids: Tensor, steps: int = 8) -> Tensor:
    """The definition of greedy decoding, one full forward for each token: (batch, seq) -> (batch, seq + steps)."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_of_every_length_are_continued_by_repeated_argmax(variant: str, attention: str):
    model = writer(variant, attn_implementation=attention)
    for length in (1, 2, 3, 7, 12):
        ids = tokens(2, length)
        assert torch.equal(model.generate(ids, **GREEDY), argmax_repeatedly(model, ids))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cache_gives_the_same_tokens(options: dict, variant: str):
    model, ids = writer(variant), tokens(2, 6)
    assert torch.equal(model.generate(ids, **GREEDY, **options), argmax_repeatedly(model, ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_guessing_tokens_ahead_changes_nothing(variant: str):
    model, ids = writer(variant), tokens(1, 6)
    expected = argmax_repeatedly(model, ids)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **GREEDY), expected)
    for assistant in (writer("dense", seed=5), writer(variant)):  # one whose guesses are wrong, one right
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)


def test_generation_goes_on_from_a_cache():
    model, ids = writer(), tokens(2, 5)
    first = model.generate(ids, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    longer = model.generate(first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=5)
    assert torch.equal(longer, argmax_repeatedly(model, ids))


def test_generation_starts_from_embeddings_too():
    model, ids = writer(), tokens(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), argmax_repeatedly(model, ids)[:, 5:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padding_does_not_change_what_is_generated(variant: str):
    model, prompts = writer(variant), [tokens(1, length, seed=length)[0] for length in (3, 8, 5)]
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    together = model.generate(batch, attention_mask=(batch != 0).long(), **GREEDY)[:, 8:]
    for prompt, text in zip(prompts, together, strict=True):
        assert torch.equal(text, argmax_repeatedly(model, prompt[None])[0, len(prompt) :])


@pytest.mark.parametrize("variant", VARIANTS)
def test_continuous_batching_gives_every_prompt_its_own_text(variant: str):
    model, prompts = writer(variant), [tokens(1, length, seed=length) for length in (3, 5, 9)]
    config = GenerationConfig(**GREEDY, **NO_END)
    outputs = model.generate_batch([prompt[0].tolist() for prompt in prompts], config, SMALL_PAGES, warmup=False)
    texts = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    for prompt in prompts:
        expected = argmax_repeatedly(model, prompt)[0, prompt.shape[1] :]
        assert texts[tuple(prompt[0].tolist())] == expected.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_beam_search_with_enough_beams_finds_the_likeliest_sequence(variant: str):
    # 8 tokens, 3 steps: 64 beams are exhaustive, so the answer is the best of all 512
    model = writer(variant, vocab_size=8)
    ids = torch.tensor([[1, 5, 2, 7]])
    every = torch.cat([ids.expand(512, -1), torch.tensor(list(product(range(8), repeat=3)))], dim=1)
    scores = model(every).logits.log_softmax(-1)[:, 3:-1].gather(-1, every[:, 4:, None]).sum(dim=(1, 2))
    found = model.generate(ids, num_beams=64, max_new_tokens=3, do_sample=False)
    assert torch.equal(found[0], every[scores.argmax()])


def test_sampling_is_reproducible_under_a_seed_and_greedy_with_one_candidate():
    model, ids = writer(), tokens(2, 4)
    draws = []
    for seed in (0, 0, 1):
        set_seed(seed)
        draws.append(model.generate(ids, max_new_tokens=8, do_sample=True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=True, top_k=1), argmax_repeatedly(model, ids))


def test_sampled_tokens_have_the_probabilities_of_the_model():
    model, ids = writer(vocab_size=8), torch.tensor([[1, 5, 2, 7]])
    set_seed(0)
    drawn = model.generate(ids, max_new_tokens=1, do_sample=True, num_return_sequences=4000, top_k=0)[:, -1]
    expected = 4000 * model(ids).logits[0, -1].softmax(-1)
    chi_square = ((drawn.bincount(minlength=8) - expected).square() / expected).sum()
    assert chi_square < 24.3  # the 0.1% point for 7 degrees of freedom


def test_what_generation_returns_is_what_the_forward_returns():
    model, ids = writer(attn_implementation="eager"), tokens(2, 5)
    output = model.generate(
        ids, **GREEDY, return_dict_in_generate=True,
        output_logits=True, output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    full = model(output.sequences[:, :-1], output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), full.logits[:, 4:], rtol=1e-4, atol=1e-4)
    for step in range(1, 8):  # step 0 is the prompt
        for actual, expected in zip(output.hidden_states[step], full.hidden_states, strict=True):
            torch.testing.assert_close(actual[:, 0], expected[:, 4 + step], rtol=1e-4, atol=1e-4)
        for actual, expected in zip(output.attentions[step], full.attentions, strict=True):
            torch.testing.assert_close(actual[:, :, 0], expected[:, :, 4 + step, : 5 + step], rtol=1e-4, atol=1e-4)


def test_the_pipeline_writes_the_text_of_generate():
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
    tokenizer.padding_side = "left"
    model = writer()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["w5 w9 w3", "w7 w1 w12 w4 w8"]
    texts = write(prompts, do_sample=False, max_new_tokens=6, batch_size=2, return_full_text=False)
    for prompt, (text,) in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = argmax_repeatedly(model, ids, 6)[0, ids.shape[1] :]
        assert text["generated_text"].split() == [f"w{index}" for index in written.tolist()]


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_logits_of_nan_are_an_error_and_not_a_text(options: dict):
    model = writer()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] = float("nan")
    sequences = 2 * options.get("num_beams", 1)
    with pytest.raises(ValueError, match=f"logits of {sequences} of {sequences} sequences are NaN"):
        model.generate(tokens(2, 4), max_new_tokens=3, **options)
    config = GenerationConfig(**GREEDY, **NO_END)
    (output,) = model.generate_batch([[5, 9]], config, SMALL_PAGES, warmup=False).values()
    assert "are NaN" in output.error and not output.generated_tokens


def test_texts_longer_than_the_trained_positions_are_written_with_a_warning(caplog):
    model, ids = writer(max_position_embeddings=16), tokens(1, 12)
    logging.getLogger("transformers").propagate = True  # to caplog
    with caplog.at_level(logging.WARNING):
        text = model.generate(ids, **GREEDY)
    assert "position 17 is beyond max_position_embeddings=16" in caplog.text
    assert torch.equal(text, argmax_repeatedly(model, ids))
