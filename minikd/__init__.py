"""minikd: the compression of a language model, small enough to read and real enough to run.

Shape letters, in docstrings and beside the lines that change a shape; a docstring that uses others defines them:
    B  sequences in a batch        V  vocabulary rows          O, I  a weight's outputs, inputs
    T  tokens of a row, padded     D  hidden size              N     scored tokens of all rows, concatenated
    H  query heads                 K  key/value heads          E     size of one head
    S  slots of a cache            P  prompts                  G     answers in a group, for one prompt
    R  response tokens             q  the student              p     the teacher
A state scores a token if its logits give that token's probability: the state at t-1 scores token t. The scored tokens are
those of the responses. A prime marks the teacher's size: D', V'. A lower-case letter is a part: n tokens of a chunk or of one
answer, b rows of a block, s slots in use. For the products in w4_matmul.cu, w4_cuda.py and decode.cu, M counts the rows of x, N
the outputs and K the inputs. logq and logp are the student's and the teacher's log-probabilities; in grpo.py and
train_grpo.py logp is the policy's.

Words: a record is one line of a file, an example (formats.py) what is asked and answered in it, a row (data.Encoded) the same as
ids. A response (data), an answer (grpo) and, as text, a completion (rewards) are the same thing. The states are the body's hidden
states, the head the matrix that turns them into logits. A digest is a hash; a judge is a function that measures a model.

The README says in which order to read the files.
"""
import sys

if sys.platform == "win32":
    raise ImportError("minikd runs on Linux and macOS; on Windows use WSL")
