"""What real clients do with a server: a program that `test_clients` runs in their environment.

usage: python client_calls.py CLIENT URL    prints what they returned, as JSON
"""

# Not a test, and no part of this project's environment: litellm and pydantic-ai are imported in the
# functions, and the types are not checked.

import asyncio
import json
import sys

SORT = "Sort: 6 3 1 7"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def with_litellm(url):
    import litellm
    from pydantic import BaseModel

    class Answer(BaseModel):
        n: int
        ok: bool

    messages = [{"role": "user", "content": SORT}]
    reached = {"api_base": url, "api_key": "none", "num_retries": 0}

    def chat(**fields):
        return litellm.completion("openai/bundled", messages, **reached, **fields)

    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    asked = {"tools": [WEATHER], "parallel_tool_calls": True}
    streamed = list(chat(**asked, tool_choice="required", stream=True))
    auto = chat(**asked, tool_choice="auto", response_format=Answer, max_tokens=60).choices[0]
    root = {**reached, "api_base": url.removesuffix("/v1")}
    claude = litellm.completion("anthropic/bundled", messages, **root, max_tokens=64)
    written = litellm.responses(input=SORT, model="openai/bundled", **reached)
    try:
        litellm.completion("openai/none", messages, **reached)
        refusal = None
    except litellm.exceptions.NotFoundError as error:
        refusal = str(error)
    return {
        "chat": (whole := chat()).choices[0].message.content,
        "tokens": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
        "stream": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        "streamed tokens": next(u.total_tokens for c in chunks if (u := getattr(c, "usage", None))),
        "called": calls_of(chat(**asked, tool_choice="required").choices[0].message.tool_calls),
        "streamed call": "".join(
            call.function.arguments
            for chunk in streamed
            for call in (chunk.choices[0].delta.tool_calls or [] if chunk.choices else [])
        ),
        "schema": chat(response_format=Answer).choices[0].message.content,
        "either": [auto.message.content, calls_of(auto.message.tool_calls or [])],
        "object": chat(response_format={"type": "json_object"}, max_tokens=60)
        .choices[0]
        .message.content,
        "anthropic": claude.choices[0].message.content,
        "responses": written.output[0].content[0].text,
        "refusal": refusal,
    }


def calls_of(calls):
    return [[call.function.name, json.loads(call.function.arguments)] for call in calls]


def with_pydantic_ai(url):
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Answer(BaseModel):
        n: int
        ok: bool

    async def stream(agent):
        async with agent.run_stream(SORT) as running:
            return [text async for text in running.stream_text(delta=True)]

    def run(kind, *, prompt=SORT, **fields):
        model = kind("bundled", provider=OpenAIProvider(base_url=url, api_key="none"))
        return Agent(model, **fields).run_sync(prompt).output

    found = {}
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("bundled", provider=OpenAIProvider(base_url=url, api_key="none"))
        found[kind.__name__] = {
            "text": run(kind),
            "stream": "".join(asyncio.run(stream(Agent(model)))),
            "tool output": run(kind, output_type=Answer).model_dump(),
            "native output": run(kind, output_type=NativeOutput(Answer)).model_dump(),
        }
    return found


def with_pydantic_ai_agent(url):
    """An agent whose model calls a tool, reads what it returned, and answers in a form."""
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Report(BaseModel):
        city: str
        sunny: bool

    model = OpenAIChatModel("bundled", provider=OpenAIProvider(base_url=url, api_key="none"))
    agent = Agent(model, output_type=NativeOutput(Report))
    asked = []

    @agent.tool_plain
    def weather(city: str) -> str:
        """Tell the weather of a city."""
        asked.append(city)
        return "sun"

    answer = agent.run_sync("How is the weather in Rome?")
    return {"asked": asked, "report": answer.output.model_dump()}


CLIENTS = {
    "litellm": with_litellm,
    "pydantic_ai": with_pydantic_ai,
    "agent": with_pydantic_ai_agent,
}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](sys.argv[2])))
