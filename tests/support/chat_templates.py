"""Small chat templates that do what published ones do, each with the markers it writes; and a tokenizer that has them.

They are written for these tests: the markers and the habits are those of the models named, the text is not.
"""

import re

from makers import build_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nbe kind .<|im_end|>\n{% endif %}" + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The first release of Llama 3's ignores add_generation_prompt.
LLAMA3_FIRST = LLAMA3[: LLAMA3.index("{% if add")]
LLAMA32 = "{{ strftime_now('%d %b %Y') }} " + LLAMA3
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Mistral v3 writes the system message into the last turn, if that is the user's.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_QWEN3_TURN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last or m.reasoning_content %}<think>\n{{ m.reasoning_content | default('') | trim }}\n</think>\n\n"
    "{% endif %}{{ m.content | trim }}"
    "{% for call in m.tool_calls | default([]) %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.first and tools %}\n# Tools\n{{ tools | tojson }}{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
)
QWEN3 = (
    _QWEN3_TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN35_THINK = _QWEN3_TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
# DeepSeek's opens a thought for generation, and writes answers without one.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜></think>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>"
    "{% if thinking is defined and not thinking %}</think>{% else %}<think>\n{% endif %}{% endif %}"
)
R1_DISTILL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final<|message|>{{ m.content }}{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# A template of a tokenizer that lacks its markers: they are mere words.
FOREIGN = CHATML.replace("<|im_", "<|turn_")
PARTS = (
    "{% for m in messages %}User: {% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
).replace("User: ", "{{ m.role | capitalize }}: ")

_MARKER = re.compile(r"<[|｜][^<>{}'\" ]{1,30}[|｜]>|</?(?:start_of_turn|end_of_turn|think|tool_call|tool_response)>")


def tokenizer_for(template, **kwargs):
    """A small tokenizer that has the markers of `template`: those around thoughts and tools are not special."""
    tokenizer = build_tokenizer(**kwargs)
    if template is not FOREIGN:
        markers = sorted(set(_MARKER.findall(template)) - set(tokenizer.get_vocab()))
        plain = [m for m in markers if "think" in m or "tool" in m or "｜" in m]
        tokenizer.add_tokens(plain)
        tokenizer.add_tokens([m for m in markers if m not in plain], special_tokens=True)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template
    return tokenizer
