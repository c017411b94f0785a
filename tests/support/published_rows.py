"""One row of each layout that preference data is published in, with the prompt that a model is to read."""

import json

SYSTEM = {"role": "system", "content": "be kind ."}
USER = {"role": "user", "content": "how ?"}
YES, NO = {"role": "assistant", "content": "so ."}, {"role": "assistant", "content": "no ."}
OPENED = "<|im_start|>user\nhow ?<|im_end|>\n<|im_start|>assistant\n"
WITH_SYSTEM = "<|im_start|>system\nbe kind .<|im_end|>\n" + OPENED
ONE_ROW = {
    "prompt beside whole conversations": (
        {"prompt": "how ?", "prompt_id": "7", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES]},
        OPENED,
    ),
    "prompt as messages beside them": ({"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}, OPENED),
    "prompt with a system message beside them": (
        {"prompt": [SYSTEM, USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        WITH_SYSTEM,
    ),
    "whole conversations": ({"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}, WITH_SYSTEM),
    "system column": ({"system": "be kind .", "prompt": "how ?", "chosen": "so .", "rejected": "no ."}, WITH_SYSTEM),
    "orca": ({"system": "be kind .", "question": "how ?", "chosen": "so .", "rejected": "no ."}, WITH_SYSTEM),
    "orca, empty system": ({"system": "", "question": "how ?", "chosen": "so .", "rejected": "no ."}, OPENED),
    "distilled orca": ({"system": "be kind .", "input": "how ?", "chosen": "so .", "rejected": "no ."}, WITH_SYSTEM),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "be kind ."}, {"from": "human", "value": "how ?"}],
            "chosen": {"from": "gpt", "value": "so ."},
            "rejected": {"from": "gpt", "value": "no ."},
        },
        WITH_SYSTEM,
    ),
    "sharegpt, answers as text": (
        {"conversations": [{"from": "human", "value": "how ?"}], "chosen": "so .", "rejected": "no ."},
        OPENED,
    ),
    "azure": (
        {
            "input": {"messages": [SYSTEM, USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
        WITH_SYSTEM,
    ),
    "azure, flat": ({"input.messages": [USER], "preferred_output": [YES], "non_preferred_output": [NO]}, OPENED),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: how ?\n\nAssistant: so .", "rejected": "\n\nHuman: how ?\n\nAssistant: no ."},
        OPENED,
    ),
    "hh-rlhf, the prompt once more": (
        {
            "prompt": "how ?",
            "chosen": "\n\nHuman: how ?\n\nAssistant: so .",
            "rejected": "\n\nHuman: how ?\n\nAssistant: no .",
        },
        OPENED,
    ),
    "hh-rlhf, the open dialogue once more": (
        {
            "prompt": "\n\nHuman: how ?\n\nAssistant:",
            "chosen": "\n\nHuman: how ?\n\nAssistant: so .",
            "rejected": "\n\nHuman: how ?\n\nAssistant: no .",
        },
        OPENED,
    ),
    "hh-rlhf, the prompt apart": (
        {"prompt": "\n\nHuman: how ?\n\nAssistant:", "chosen": " so .", "rejected": " no ."},
        OPENED,
    ),
    "hh-rlhf and a system column": (
        {
            "system": "be kind .",
            "prompt": "\n\nHuman: how ?\n\nAssistant:",
            "chosen": " so .",
            "rejected": " no .",
        },
        WITH_SYSTEM,
    ),
    "messages as JSON": (
        {"prompt": json.dumps([SYSTEM, USER]), "chosen": json.dumps([YES]), "rejected": json.dumps(NO)},
        WITH_SYSTEM,
    ),
    "parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "how"}, {"type": "text", "text": " ?"}]}],
            "chosen": [YES],
            "rejected": [NO],
        },
        OPENED,
    ),
    "instruction, named": ({"instruction": "how ?", "chosen": "so .", "rejected": "no ."}, OPENED),
}
