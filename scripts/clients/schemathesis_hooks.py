"""Changes the requests of schemathesis so that they can be answered: texts and shapes stay, but values are in range, and fields that
exclude each other do not come together.

Without this, most requests would be refused, for a model that is not here or an invalid schema, and the shapes of answers would
hardly be tested.
"""
import schemathesis

FORMATS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
REFUSED = ("model", "max_completion_tokens", "best_of", "min_tokens", "add_generation_prompt", "continue_final_message", *FORMATS)
RANGES = {  # least and most
    "n": (1, 3), "temperature": (0, 2), "top_p": (0.1, 1), "top_k": (-1, 50), "min_p": (0, 0.5), "top_logprobs": (0, 5),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": (0.5, 2), "prompt_logprobs": (0, 5),
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
FORMS = {0: {"guided_choice": ["가", "나다"]}, 1: {"response_format": {"type": "text"}}, 2: {"guided_regex": "[a-c]{1,9}"}}


def within(value, least, most):
    return min(max(value, least), most) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


@schemathesis.hook
def before_call(_, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    fields = {k: v for k, v in body.items() if v is not None and k not in REFUSED}
    for name, range in RANGES.items():
        if name in fields:
            fields[name] = within(fields[name], *range)
    if "prompt" in fields or "messages" in fields:
        if case.path.startswith("/v1/"):
            fields["max_tokens"] = 6
            fields.pop("tool_choice", None)
            if "tools" in fields:
                fields["tools"] = TOOLS if case.path == "/v1/chat/completions" else []
            elif case.path != "/v1/messages":  # Three of eight have an answer of a given form.
                fields |= FORMS.get(len(str(fields)) % 8, {})
    if "input" in fields and case.path == "/v1/responses":
        fields |= {"max_output_tokens": 6, "tools": []}
        fields.pop("tool_choice", None)
        fields.pop("text", None)
    if "dimensions" in fields:
        fields["dimensions"] = within(fields["dimensions"], 1, 64)
    if isinstance(fields.get("logprobs"), int) and not isinstance(fields["logprobs"], bool):
        fields["logprobs"] = within(fields["logprobs"], 0, 5)
    if "top_logprobs" in fields:
        fields["logprobs"] = True
    if not fields.get("stream"):
        fields.pop("stream_options", None)
    if "logit_bias" in fields:
        fields["logit_bias"] = {"7": 1.5}
    stop = fields.get("stop")
    if stop is not None:
        fields["stop"] = [s for s in ([stop] if isinstance(stop, str) else stop) if isinstance(s, str) and s][:4]
    for name in ("stop_token_ids", "tokens"):
        if isinstance(fields.get(name), list):
            fields[name] = [id % 2000 for id in fields[name] if isinstance(id, int)][:50]
    prompt = fields.get("prompt")
    if case.path == "/tokenize" and "messages" in fields:
        fields.pop("prompt", None)
        fields.pop("add_special_tokens", None)
    elif isinstance(prompt, list):
        ids = lambda list: [id % 2000 for id in list if isinstance(id, int)][:50] or [1]
        lists = [ids(p) if isinstance(p, list) else p for p in prompt][:3]
        fields["prompt"] = ids(prompt) if any(isinstance(p, int) for p in prompt) else lists or "가"
    case.body = fields
