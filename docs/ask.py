"""Ask the service about a context that it has: `python docs/ask.py NAME QUESTION`."""

import sys

from openai import OpenAI

name, question = sys.argv[1:]
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": question}],
    extra_body={"context": name},
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage is not None:
        cached = chunk.usage.prompt_tokens_details.cached_tokens
        print(f"\n({chunk.usage.prompt_tokens} tokens of context and question, {cached} encoded before)")
