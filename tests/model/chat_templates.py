"""Chat templates that use what real ones use, and conversations in which that matters."""

from typing import Any

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start|>' + message['role'] + '<|stop|>\n\n' + message['content'] | trim + '<|end|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"""

CHATML = """{%- if messages[0]['role'] != 'system' -%}
    {{- '<|start|>system\nYou help.<|end|>\n' -}}
{%- endif -%}
{%- for message in messages %}
    {{- '<|start|>' + message.role + '\n' + message.content + '<|end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{% if message['content'] is string %}{% set text = message['content'] %}
{% else %}{% set text = message['content'][0]['text'] %}{% endif %}
{{ '<|start|>' + role + '\n' + (text | trim) + '<|end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<|start|>model\n'}}{% endif %}"""

THINKING = """{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|start|>' + message.role + '\n' + content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n<think>\n' }}{% endif %}"""

FROM_ROLES = """{% for message in messages %}{% generation %}{{ '<|' + message.role + '|>' + '\n' + message.content }}
{%- endgeneration %}{{ '<|end|>' + '\n' }}{% if loop.last %}{% break %}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

HERMES = """{%- macro text_of(content) -%}
    {%- if content is string -%}{{ content }}{%- elif content is iterable and content is not mapping -%}
        {%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=messages | length - 1, seen=false) -%}
{%- for message in messages[::-1] if not ns.seen -%}
    {%- if message.role == 'user' and not (message.content is string and message.content.startswith('<tool>')) -%}
        {%- set ns.seen = true -%}{%- set ns.last = messages | length - 1 - loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- if tools -%}
    {{- '<|start|>system\n' -}}
    {%- if messages[0].role == 'system' %}{{- text_of(messages[0].content) + '\n\n' -}}{% endif -%}
    {{- '# Tools\n<tools>' -}}
    {%- for tool in tools %}{{- '\n' ~ (tool | tojson) -}}{% endfor -%}
    {{- '\n</tools><|end|>\n' -}}
{%- endif -%}
{%- for message in messages if not (tools and loop.first and message.role == 'system') -%}
    {%- set role, previous = message['role'], loop.previtem -%}
    {%- if role == 'tool' -%}
        {%- if previous is not defined or previous.role != 'tool' -%}{{- '<|start|>user' -}}{%- endif -%}
        {{- '\n<response>\n' ~ text_of(message.content) ~ '\n</response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|end|>\n' -}}{%- endif -%}
        {%- continue -%}
    {%- endif -%}
    {{- '<|start|>' ~ role ~ '\n' -}}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last -%}
        {{- '<think>\n' ~ message.reasoning_content.strip('\n') ~ '\n</think>\n\n' -}}
    {%- endif -%}
    {{- text_of(message.content) -}}
    {%- for call in message.tool_calls | default([]) -%}
        {%- set call = call.function if call.function is defined else call -%}
        {{- '\n<call>' ~ call.name ~ ' ' ~ (call.arguments if call.arguments is string else call.arguments | tojson) -}}
        {%- for key, value in call.arguments | items -%}{{- ' ' ~ key ~ '=' ~ value | string -}}{%- endfor -%}
    {%- endfor -%}
    {{- '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""

DATED = """{{ bos_token }}<|start|>system
Today: {{ strftime_now('%d %b %Y') }}
{% set loop_messages = messages %}
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}
{% set loop_messages = messages[1:] %}
{% endif %}
{% if tools is not none %}{% for t in tools %}{{ t.function | tojson(indent=4) }}
{% for name, schema in t.function.parameters.properties.items() | sort %}
 {{ name | title }}: {{ schema.type | upper }}{{ ' (needed)' if name in t.function.parameters.required }}
{% endfor %}{% endfor %}{% endif %}<|end|>
{% for m in loop_messages %}{% if m.role not in ['user', 'assistant', 'tool'] %}
{{ raise_exception('no ' ~ m.role ~ ' here') }}{% endif %}
<|start|>{{ {'user': 'human', 'assistant': 'model'}.get(m.role, m.role) }}<|stop|>
{{ (m.content or '') | replace('\t', ' ') }}<|end|>
{% endfor %}
{% if add_generation_prompt %}<|start|>model<|stop|>
{% endif %}"""

TEMPLATES = {
    "hermes": HERMES,
    "dated": DATED,
    "llama3": LLAMA3,
    "chatml": CHATML,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "thinking": THINKING,
    "from roles": FROM_ROLES,
}
SPECIALS = ["<|start|>", "<|stop|>", "<|end|>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>"]


def say(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = [
    say("Hello!"),
    say("Once upon a time", "there was a dog.", "  And then?  \n"),
    say(" leading and trailing ", "\n\n", "\tx\n"),
    say("5 < 6 > 4 | [x] <b>bold</b>", "a<|b", "naïve 👩‍👩‍👧‍👦 日本 שלום"),
    say("", "", ""),
    say("think", "<think>\nwell < well\n</think>\n\nThe answer", "why?"),
    [{"role": "system", "content": " Be brief.\n"}, *say("Hi", "Yes.")],
    [{"role": "system", "content": ""}, *say("Hi")],
]
REFUSED = [{"role": "user", "content": "Hi"}, {"role": "developer", "content": "x"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The <weather> of a \"place\" & 日本",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2]}},
                "required": ["place"],
            },
        },
    }
]
CALL = {"name": "weather", "arguments": {"place": "Ville d'Avray <b>", "days": 1}}
CALLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "reasoning_content": "\nhm\n", "tool_calls": [{"function": CALL}, CALL]},
    {"role": "tool", "content": '{"sun": true}'},
    {"role": "tool", "content": [{"type": "text", "text": "< 7°"}]},
]
