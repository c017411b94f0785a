"""What a table of pairs says, as text."""


def texts(table, tokenizer):
    return [
        tuple(
            tokenizer.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (p.chosen_ids, p.rejected_ids)
        )
        for p in (table[i] for i in range(len(table)))
    ]
