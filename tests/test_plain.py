"""plain.py, the shortest form of everything, against what the package computes."""
from pathlib import Path

import pytest
import torch

from conftest import random_ids, random_logits, random_model
from minikd import plain
from minikd.checkpoint import load_model, save_model
from minikd.generate import generate
from minikd.gptq import Hessian, quantize_matrix
from minikd.grpo import group_advantages, policy_loss, token_weights
from minikd.head import head_loss, scored_positions
from minikd.losses import clipped_surrogate, forward_kl, reverse_kl
from minikd.minillm import rewards_to_go
from minikd.rouge import rouge_l

GOLDEN = sorted(path for path in (Path(__file__).parent / "golden").iterdir() if (path / "config.json").exists())


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    save_model(random_model(seed=0), folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save_model(random_model(seed=5, hidden_size=36, tie_word_embeddings=True), folder)
    return folder


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
def test_the_decoder_gives_the_same_logits_and_answers(folder):
    weights, config = plain.load(folder)
    model, ids = load_model(folder), random_ids(2, 9, V=config["vocab_size"])
    torch.testing.assert_close(plain.logits(weights, config, ids), model(ids), rtol=0, atol=5e-5)
    prompt = ids[0].tolist()
    answer, = generate(model, [prompt], max_new_tokens=12)
    assert plain.generate(weights, config, prompt, 12) == answer
    stop = answer[3]
    assert plain.generate(weights, config, prompt, 12, {stop}) == answer[:answer.index(stop) + 1]


def test_a_sampled_token_has_the_probability_of_its_temperature(student, monkeypatch):
    weights, config = plain.load(student)
    drawn_from = []

    def draw(probabilities, count, generator):
        drawn_from.append(probabilities)
        return torch.tensor(count * [5 + len(drawn_from)])                      # 6, then 7

    monkeypatch.setattr(torch, "multinomial", draw)
    assert plain.generate(weights, config, [5, 6], 2, temperature=0.5) == [6, 7]
    for probabilities, ids in zip(drawn_from, ([5, 6], [5, 6, 6]), strict=True):
        wanted = (load_model(student)(torch.tensor([ids]))[0, -1] / 0.5).softmax(-1)                    # [V]
        torch.testing.assert_close(probabilities, wanted)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_a_distillation_step_has_the_same_loss_and_gradients(student, teacher, kd_ratio):
    weights, config = plain.load(student)
    ids = random_ids(3, 8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3:6] = mask[1, 5:] = mask[2, 1:7] = True                            # three answers
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    loss = plain.kd_loss(plain.logits(weights, config, ids), plain.logits(*plain.load(teacher), ids), ids, mask, kd_ratio)
    loss.backward()

    model, other = load_model(student).train(), load_model(teacher)
    states, targets = scored_positions(model.hidden(ids), ids, mask)
    with torch.no_grad():
        teacher_states, _ = scored_positions(other.hidden(ids), ids, mask)
    wanted, *_ = head_loss(states, model.head, targets, teacher_states, other.head, forward_kl, kd_ratio, weight=1 / 12)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_minillm_is_the_exact_step_and_the_policy_gradient():
    logits, teacher_logits, tokens = random_logits(5, 7), random_logits(5, 7, seed=1), torch.tensor([3, 0, 6, 1, 2])
    logits, same = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    plain.minillm_loss(logits.log_softmax(-1), teacher_logits.log_softmax(-1), tokens).backward()
    logq, logp = (x.log_softmax(-1).gather(-1, tokens[:, None])[:, 0] for x in (same, teacher_logits))
    policy = clipped_surrogate(logq, logq.detach(), rewards_to_go(logq.detach(), logp, length_norm=False))
    (reverse_kl(same, teacher_logits) + policy).sum().backward()
    torch.testing.assert_close(logits.grad, same.grad)


def test_grpo_has_the_same_advantages_loss_and_gradient():
    rewards = torch.tensor([[1.0, 0.0, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5]])
    advantages = plain.group_advantages(rewards)
    torch.testing.assert_close(advantages, group_advantages(rewards))
    logp, old, ref = (-random_logits(4, 6, seed=seed, scale=0.5).abs() for seed in range(3))            # [G, R]
    lengths, A = [6, 2, 5, 1], advantages[0]
    logp, same = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss = sum(plain.grpo_loss(logp[i, :n], old[i, :n], ref[i, :n], A[i]) for i, n in enumerate(lengths)) / 4
    loss.backward()
    each = policy_loss(same, old, ref, A)                                       # [G, R]
    wanted = sum(w * each[i, :n].sum() for i, (n, w) in enumerate(zip(lengths, token_weights(lengths))))
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(logp.grad, same.grad)
    ratios = (logp - old).exp()
    assert (ratios > 1.2).any() and (ratios < 0.8).any()                        # the clip had something to do


@pytest.mark.parametrize("group_size", [8, 32])
def test_gptq_gives_the_same_codes(group_size):
    generator = torch.Generator().manual_seed(0)
    weight, mixing = torch.randn(24, 32, generator=generator), torch.randn(32, 32, generator=generator)
    inputs = torch.randn(400, 32, generator=generator) @ mixing                 # correlated
    hessian = Hessian(32)
    hessian.add(inputs, torch.ones(400))
    codes, scales = plain.gptq(weight, 2 * inputs.T @ inputs / 400, group_size)
    wanted, wanted_scales, zeros = quantize_matrix(weight, hessian.finish(), group_size=group_size, act_order=False)
    assert (zeros == 8).all() and torch.equal(codes.to(torch.uint8), wanted)
    torch.testing.assert_close(scales, wanted_scales)


def test_rouge_l_gives_the_same_score():
    words = "the cat sat on a mat".split()
    texts = [[words[i] for i in random_ids(n, seed=n, V=6).tolist()] for n in range(1, 9)]
    for a in texts:
        for b in texts:
            assert plain.rouge_l(a, b) == pytest.approx(rouge_l(" ".join(a), " ".join(b))[2])
