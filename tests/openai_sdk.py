"""The official `openai` package against a running server, unchanged.

Usage: openai_sdk.py BASE_URL KEY CHAT_MODEL [BASE_MODEL]   (or LOQUAT_URL, LOQUAT_KEY, LOQUAT_CHAT_MODEL, LOQUAT_BASE_MODEL)
BASE_URL ends in /v1. Every check prints one line; the exit code is the number of failed checks.
"""

import json
import os
import re
import sys
import time
import traceback

import openai

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def argument(index, name):
    value = sys.argv[index] if len(sys.argv) > index else os.environ.get(name, "")
    return value


URL = argument(1, "LOQUAT_URL")
KEY = argument(2, "LOQUAT_KEY")
CHAT = argument(3, "LOQUAT_CHAT_MODEL")
BASE = argument(4, "LOQUAT_BASE_MODEL")
QUESTION = [{"role": "user", "content": "Say hello in one short sentence."}]


def client(key=KEY):
    return openai.OpenAI(base_url=URL, api_key=key, max_retries=0, timeout=120)


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


@check
def models_are_listed():
    ids = [model.id for model in client().models.list()]
    assert CHAT in ids and (not BASE or BASE in ids), ids
    assert client().models.retrieve(CHAT).id == CHAT


@check
def chat_whole():
    answer = client().chat.completions.create(model=CHAT, messages=QUESTION, max_tokens=24, temperature=0)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content, answer
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer._request_id


@check
def chat_streamed_is_the_same_text():
    options = dict(model=CHAT, messages=QUESTION, max_tokens=24, temperature=0)
    whole = client().chat.completions.create(**options)
    text, usage, roles = "", None, []
    for chunk in client().chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            text += choice.delta.content or ""
    assert text == whole.choices[0].message.content, (text, whole)
    assert roles == ["assistant"]
    assert usage.completion_tokens == whole.usage.completion_tokens


@check
def async_streams_side_by_side():
    import asyncio

    async def one(asynchronous, index):
        stream = await asynchronous.chat.completions.create(
            model=CHAT, messages=QUESTION, max_tokens=8, temperature=0, stream=True, seed=index
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=120) as asynchronous:
            return await asyncio.gather(*(one(asynchronous, index) for index in range(4)))

    texts = asyncio.run(all_of_them())
    assert len(set(texts)) == 1 and texts[0], texts


@check
def text_completions():
    model = BASE or CHAT
    options = dict(model=model, prompt="My fellow Americans", max_tokens=12, temperature=0)
    whole = client().completions.create(**options)
    assert whole.object == "text_completion" and whole.usage.completion_tokens <= 12
    streamed = "".join(c.choices[0].text for c in client().completions.create(stream=True, **options) if c.choices)
    assert streamed == whole.choices[0].text
    echoed = client().completions.create(echo=True, **options)
    assert echoed.choices[0].text == "My fellow Americans" + whole.choices[0].text
    several = client().completions.create(**{**options, "prompt": ["My fellow", "The state of"]}, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


@check
def prompts_are_scored():
    options = dict(model=BASE or CHAT, prompt="My fellow Americans", max_tokens=0, echo=True, logprobs=1)
    scores = client().completions.create(**options).choices[0].logprobs
    assert scores.token_logprobs[0] is None and all(score <= 0 for score in scores.token_logprobs[1:])
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs)


@check
def seeds_decide():
    def ask(seed):
        options = dict(model=CHAT, messages=QUESTION, max_tokens=16, temperature=1.5, seed=seed)
        return client().chat.completions.create(**options).choices[0].message.content

    assert ask(7) == ask(7)


@check
def stop_strings_are_cut():
    whole = client().chat.completions.create(model=CHAT, messages=QUESTION, max_tokens=24, temperature=0)
    text = whole.choices[0].message.content
    middle = text[len(text) // 2 :][:4]
    cut = client().chat.completions.create(
        model=CHAT, messages=QUESTION, max_tokens=24, temperature=0, stop=[middle]
    ).choices[0]
    assert cut.message.content == text[: text.index(middle)], (text, middle, cut)
    assert cut.finish_reason == "stop"


@check
def logprobs_come_along():
    answer = client().chat.completions.create(
        model=CHAT, messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    first = answer.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 3 and first.logprob <= 0
    assert first.top_logprobs[0].token == first.token


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 16},
        "sky": {"enum": ["clear", "clouds", "rain"]},
        "degrees": {"type": "integer", "minimum": -40, "maximum": 50},
        "alerts": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 2},
    },
    "required": ["city", "sky", "degrees", "alerts"],
    "additionalProperties": False,
}


def check_weather(text):
    value = json.loads(text)
    assert set(value) == set(SCHEMA["required"]), text
    assert 1 <= len(value["city"]) <= 16 and value["sky"] in ("clear", "clouds", "rain"), text
    assert type(value["degrees"]) is int and -40 <= value["degrees"] <= 50, text
    assert len(value["alerts"]) <= 2 and all(len(alert) <= 12 for alert in value["alerts"]), text


@check
def json_schemas_hold_at_any_temperature():
    question = [{"role": "user", "content": "What is the weather in Paris? Answer in JSON."}]
    response_format = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": SCHEMA}}
    options = dict(model=CHAT, messages=question, temperature=1, max_tokens=200, response_format=response_format)
    texts = []
    for seed in range(4):
        answer = client().chat.completions.create(n=5, seed=seed * 5, **options)
        assert [choice.index for choice in answer.choices] == list(range(5))
        assert all(choice.finish_reason == "stop" for choice in answer.choices), answer
        texts += [choice.message.content for choice in answer.choices]
    assert len(texts) == 20 and len(set(texts)) > 5
    for text in texts:
        check_weather(text)
    stream = client().chat.completions.create(stream=True, **options)
    check_weather("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))


@check
def other_structures_hold():
    def ask(**extra):
        options = dict(model=CHAT, messages=QUESTION, temperature=1, max_tokens=40, extra_body=extra)
        return client().chat.completions.create(**options).choices[0].message.content

    assert ask(structured_outputs={"choice": ["red", "green"]}) in ("red", "green")
    assert re.fullmatch("[0-9]{4}-[01][0-9]", ask(guided_regex="[0-9]{4}-[01][0-9]"))
    assert re.fullmatch("[0-9]+[+-][0-9]+", ask(guided_grammar='start: N ("+" | "-") N\nN: /[0-9]{1,3}/'))
    json_object = dict(model=CHAT, messages=QUESTION, max_tokens=60, response_format={"type": "json_object"})
    assert client().chat.completions.create(**json_object).choices[0].message.content.startswith("{")


@check
def several_answers_share_a_prompt():
    options = dict(model=CHAT, messages=QUESTION, max_tokens=12, temperature=1, seed=1)
    one = client().chat.completions.create(**options)
    three = client().chat.completions.create(n=3, **options)
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.choices[0].message.content == one.choices[0].message.content
    texts, usage = {}, None
    for chunk in client().chat.completions.create(n=3, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert [texts[i] for i in range(3)] == [choice.message.content for choice in three.choices]
    assert usage.completion_tokens == three.usage.completion_tokens


@check
def the_best_of_several_is_sent():
    options = dict(model=BASE or CHAT, prompt="My fellow", max_tokens=6, temperature=1, seed=2, logprobs=1)
    everything = client().completions.create(n=4, **options)
    best = client().completions.create(best_of=4, **options)

    def mean(choice):
        scores = choice.logprobs.token_logprobs
        return sum(scores) / max(len(scores), 1)

    assert best.choices[0].text == max(everything.choices, key=mean).text
    assert best.usage.completion_tokens == everything.usage.completion_tokens


@check
def scoring_a_prompt_is_what_generating_it_was():
    options = dict(model=BASE or CHAT, temperature=0, logprobs=1)
    whole = client().completions.create(prompt="My fellow Americans", max_tokens=8, echo=True, **options).choices[0]
    ids_of_prompt = len([offset for offset in whole.logprobs.text_offset if offset < len("My fellow Americans")])
    scored = client().completions.create(prompt=whole.text, max_tokens=0, echo=True, **options).choices[0]
    if scored.logprobs.tokens == whole.logprobs.tokens:
        pairs = zip(scored.logprobs.token_logprobs[1:], whole.logprobs.token_logprobs[1:])
        assert all(abs(a - b) < 0.05 for a, b in pairs), (scored, whole)
    assert scored.text == whole.text and ids_of_prompt > 1
    beside = dict(model=BASE or CHAT, prompt="My fellow Americans", max_tokens=1, temperature=0)
    listed = client().completions.create(extra_body={"prompt_logprobs": 1}, **beside).choices[0].prompt_logprobs
    for position, entry in list(enumerate(listed))[1:]:
        own = whole.logprobs.token_logprobs[position]
        assert any(abs(item["logprob"] - own) < 0.05 for item in entry.values()), (position, entry, own)


@check
def sampling_fields_are_taken():
    extra = dict(top_k=20, min_p=0.02, typical_p=0.95, repetition_penalty=1.05, min_tokens=3, priority=1)
    answer = client().chat.completions.create(
        model=CHAT, messages=QUESTION, max_tokens=8, logit_bias={"5": -100}, presence_penalty=0.2, extra_body=extra
    )
    assert answer.usage.completion_tokens >= 3
    exact = dict(model=CHAT, messages=QUESTION, max_tokens=40, extra_body={"ignore_eos": True})
    assert client().chat.completions.create(**exact).usage.completion_tokens == 40
    for field, value in [("typical_p", 0), ("guided_regex", "("), ("prompt_logprobs", 21), ("top_k", -5)]:
        call = lambda: client().chat.completions.create(model=CHAT, messages=QUESTION, extra_body={field: value})
        assert raises(openai.BadRequestError, call).param == field


@check
def a_wrong_key_is_an_authentication_error():
    error = raises(openai.AuthenticationError, lambda: client("sk-wrong").models.list())
    assert error.code == "invalid_api_key"


@check
def an_unknown_model_is_not_found():
    call = lambda: client().chat.completions.create(model="no-such-model", messages=QUESTION)
    assert raises(openai.NotFoundError, call).code == "model_not_found"


@check
def bad_fields_are_bad_requests():
    for field, value in [("temperature", 3), ("n", 0), ("top_p", 2), ("max_tokens", 0), ("stop", [""])]:
        call = lambda: client().chat.completions.create(model=CHAT, messages=QUESTION, **{field: value})
        assert raises(openai.BadRequestError, call).param == field
    error = raises(openai.BadRequestError, lambda: client().chat.completions.create(model=CHAT, messages=[]))
    assert error.param == "messages"


@check
def a_long_prompt_is_refused():
    messages = [{"role": "user", "content": "word " * 200_000}]
    call = lambda: client().chat.completions.create(model=CHAT, messages=messages)
    assert raises(openai.BadRequestError, call).code == "context_length_exceeded"


@check
def a_stream_can_be_left():
    stream = client().chat.completions.create(model=CHAT, messages=QUESTION, max_tokens=200, stream=True)
    for _, _chunk in zip(range(3), stream):
        pass
    stream.close()
    started = time.monotonic()
    chat_whole()
    assert time.monotonic() - started < 60


def main():
    if not (URL and KEY and CHAT):
        sys.exit(__doc__)
    n_failed = 0
    for function in CHECKS:
        started = time.monotonic()
        try:
            function()
            verdict = "ok"
        except Exception:
            n_failed += 1
            verdict = "FAILED\n" + traceback.format_exc()
        print(f"{function.__name__} ({time.monotonic() - started:.1f} s): {verdict}", flush=True)
    print(f"{len(CHECKS) - n_failed} of {len(CHECKS)} checks passed")
    sys.exit(n_failed)


main()
