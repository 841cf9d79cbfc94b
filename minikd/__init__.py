"""minikd: the compression of a language model, small enough to read and real enough to run.

Shape letters, in docstrings and beside the lines that change a shape; a docstring that needs others says which:
    B  sequences in a batch        V  vocabulary rows          O, I  a weight's outputs, inputs
    T  tokens = P prompt + R resp. D  hidden size              N     scored tokens, all rows flattened
    H  query heads                 K  key/value heads          E     size of one head
    S  slots of a cache            G  answers in a group       M     rows of a product, beside its N outputs, K inputs

Reading order: files model quant checkpoint tokenizer records data toy losses generate teacher minillm grpo problems sandbox
rewards gptq rouge evaluate training plots; what is about speed alone, last: layout cuda w4_cuda decode_cuda.
"""
