"""minikd: the compression of a language model, small enough to read and real enough to run.

Shape letters, used in every docstring and beside every line that changes a shape:
    B  sequences in a batch        V  vocabulary rows          O, I  a weight's outputs, inputs
    T  tokens = P prompt + R resp. D  hidden size              N     scored tokens, all rows flattened
    H  query heads                 K  key/value heads          E     size of one head
"""
