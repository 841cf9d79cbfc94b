"""minikd: the compression of a language model, small enough to read and real enough to run.

Shape letters, in docstrings and beside the lines that change a shape; a docstring that uses others defines them:
    B  sequences in a batch        V  vocabulary rows          O, I  a weight's outputs, inputs
    T  tokens of a row, padded     D  hidden size              N     scored tokens of all rows, concatenated
    H  query heads                 K  key/value heads          E     size of one head
    S  slots of a cache            P  prompts                  G     answers in a group, for one prompt
    R  response tokens             q  the student              p     the teacher
A prime marks the teacher's size: D', V'. Lower case is a part: n tokens of a chunk, b rows of a block. In the CUDA files
M counts the rows of a product, N its outputs and K its inputs.

Reading order (the README's list is the order of imports): files hub model quant checkpoint tokenizer records data toy losses
generate teacher minillm grpo problems sandbox rewards gptq rouge evaluate training plots; last the files that only concern
speed: layout cuda attend_cuda fused_cuda w4_cuda loss_cuda decode_cuda.
"""
import sys

if sys.platform == "win32":
    raise ImportError("minikd runs on Linux and macOS; on Windows use WSL")
