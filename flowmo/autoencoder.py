"""FlowMo: pictures to tokens and back.

Shapes: B images, S image side, T latent tokens, C latent channels, E of them to a token, p patch side.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from flowmo import pretrained
from flowmo.config import ModelConfig, model_config
from flowmo.engine import DecodePlan, EncodePlan, Engine, Execution, Schedule, StepCache
from flowmo.layers import patchify, unpatchify
from flowmo.quantizer import Quantized, code_tokens, codes_of_latent, quantize, token_codes
from flowmo.solvers import sample
from flowmo.transformer import MMDiT


class FlowMo(nn.Module):
    """The diffusion autoencoder of Sargent et al. 2025.

        model = FlowMo.from_pretrained("flowmo_lo.pth")   # or a folder written by save_pretrained
        tokens = model.tokenize(images)                   # images [B, 3, 256, 256] in [-1, 1]
        pictures = model.detokenize(tokens)

    Args:
        config: sizes, or the name of a preset ("lo", "hi", "small", "continuous", "tiny", "quickstart").

    Attributes:
        sampler: the steps, rho and guidance that decoding takes where nobody says others: the paper's, or those that a
            distilled decoder was made for, which its files carry.
    """

    def __init__(self, config: ModelConfig | str = "lo") -> None:
        super().__init__()
        self.config = c = model_config(config) if isinstance(config, str) else config
        c.check()
        shared = {
            "heads": c.heads,
            "grid": c.grid,
            "latent_tokens": c.latent_tokens,
            "patch_dim": 3 * c.patch**2,
        }
        self.encoder = MMDiT(
            hidden=c.encoder_hidden,
            depth=c.encoder_depth,
            latent_channels=c.latent_channels,
            latent_out=2 * c.latent_channels if c.quantizer == "kl" else None,  # mean and log-variance
            output="txt",
            **shared,
        )
        self.decoder = MMDiT(
            hidden=c.decoder_hidden,
            depth=c.decoder_depth,
            latent_channels=c.latent_channels + 1,  # and the flag that tells a code from the null condition
            output="img",
            **shared,
        )
        self.engine = Engine()
        self.sampler = Schedule()

    def schedule(
        self,
        steps: int | None = None,
        rho: float | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = (0.17, 1.02),
        solver: str = "euler",
        tail_merge: int | None = None,
    ) -> Schedule:
        """Sampler options, with this model's own steps, rho and guidance in the place of None."""
        own = self.sampler
        return Schedule(
            own.steps if steps is None else steps,
            own.rho if rho is None else rho,
            own.guidance if guidance is None else guidance,
            _pair(guidance_interval),
            solver,
            tail_merge,
        )

    @property
    def device(self) -> torch.device:
        return self.decoder.img_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.img_in.weight.dtype

    # The two transformers as functions, for training and samplers: no checks, gradients flow.

    def latent(
        self,
        images: Tensor,  # [B, 3, S, S] in [-1, 1]
    ) -> Tensor:  # [B, T, C], or [B, T, 2 C] of quantizer kl
        """Encoder output before quantization (paper, eq. 1); the initial latent is all zeros."""
        patches = patchify(images, self.config.patch)
        zeros = patches.new_zeros(patches.shape[0], self.config.latent_tokens, self.config.latent_channels)
        return self.encoder(patches, zeros)

    def quantize(
        self,
        latent: Tensor,  # [B, T, C], or [B, T, 2 C] of quantizer kl
        noise: Tensor | None = None,  # [B, T, C], of quantizer kl
    ) -> Quantized:
        """See :func:`flowmo.quantizer.quantize`."""
        return quantize(latent, self.config, noise)

    def condition(
        self,
        codes: Tensor,  # [B, T, C]
        keep: Tensor | bool = True,  # [B] bool, or one for all
    ) -> Tensor:  # [B, T, C + 1]
        """Decoder input: the code and a channel of ones; all zeros (the null condition) where `keep` is False."""
        condition = torch.cat([codes, torch.ones_like(codes[..., :1])], dim=-1)
        if isinstance(keep, bool):
            return condition if keep else torch.zeros_like(condition)
        return condition * keep[:, None, None].to(condition.dtype)

    def velocity(
        self,
        x_t: Tensor,  # [B, (S / p)^2, 3 p^2] noised picture as patch tokens
        t: Tensor,  # [B]
        condition: Tensor,  # [B, T, C + 1]
    ) -> Tensor:  # [B, (S / p)^2, 3 p^2]
        """Decoder velocity, noise minus data (paper, eq. 3, with the sign of the released checkpoints)."""
        return self.decoder(x_t, condition, t)

    # The user's calls.

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,  # [B, 3, S, S], float, in [-1, 1]
        plan: bool = True,
    ) -> Tensor:  # [B, T, C]
        """Codes of pictures, in the weights' dtype: +-1 (lfq), levels in [-1, 1] (fsq), or real numbers (kl, none).

        A kl model's code is the mean. The look at the range of pictures on a card waits for that card; plans and
        captures of the caller's do without it.

        Args:
            plan: run the engine (see :meth:`encode_plan`); False runs the modules themselves, hooks and all.

        Raises:
            TypeError, ValueError: images of another dtype, shape, size or range.
        """
        self._check_images(images)
        if not plan or not images.shape[0]:
            return codes_of_latent(self.latent(images.to(self.device, self.dtype)), self.config)
        with self.engine.lock:
            engine_plan = self.engine.encode_plan(self, images.shape[0], Execution(self._precision()))
            return engine_plan.run(images).to(self.dtype)

    def tokenize(
        self,
        images: Tensor,  # [B, 3, S, S], float, in [-1, 1]
    ) -> Tensor:  # [B, T C / E] int64 in [0, vocabulary); E channels make a token
        """Integer tokens of pictures.

        With F = C / E groups per latent token, token n = t F + f holds the channels k F + f of latent token t. Of lfq
        they are its bits k, bit 0 the least significant: token = sum_k 2^k [code > 0]. Of fsq they are the digits of
        a mixed-radix number, the first level's the least significant (:func:`flowmo.quantizer.fsq_tokens`).

        Raises:
            TypeError, ValueError: as :meth:`encode`, or a continuous model, which has no tokens.
        """
        self._check_discrete()
        return code_tokens(self.encode(images), self.config)

    def detokenize(self, tokens: Tensor, **sampler: Any) -> Tensor:
        """Pictures [B, 3, S, S] of tokens [B, T C / E]; takes the options of :meth:`decode`.

        Raises:
            TypeError, ValueError: tokens of another dtype, shape or value, or a continuous model.
        """
        self._check_discrete()
        c = self.config
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.is_complex():
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens: expected an integer tensor [B, {c.tokens}], got {got}")
        if tokens.ndim != 2 or tokens.shape[1] != c.tokens:
            raise ValueError(f"tokens: expected shape [B, {c.tokens}], got {list(tokens.shape)}")
        size, tokens = c.vocabulary or 0, tokens.long()
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise ValueError(
                f"tokens: expected values in [0, {size}), got {int(tokens.min())} to {int(tokens.max())}; tokens of "
                "another model?"
            )
        return self.decode(token_codes(tokens.to(self.device), c), **sampler)

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,  # [B, T, C]
        steps: int | None = None,
        rho: float | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = (0.17, 1.02),
        noise: Tensor | None = None,  # [B, 3, S, S], standard normal
        generator: torch.Generator | None = None,
        solver: str = "euler",
        tail_merge: int | None = None,
        plan: bool = True,
    ) -> Tensor:  # [B, 3, S, S] fp32 in [-1, 1]
        """Pictures of codes by the guided Euler sampler.

        Args:
            steps: solver steps; times are ((n - i) / n)^rho. None: the model's own, 25 with rho 4 and guidance 1.5
                unless it was distilled.
            guidance: weight w of v_null + w (v - v_null); 1 switches guidance off.
            guidance_interval: EDM noise-to-signal ratios between which guidance acts; None guides every step.
            noise: the starting noise; drawn from `generator` (or the global state) where None. The same noise, or
                a generator of the same seed on the same kind of device, gives the same picture.
            solver: "euler" (the paper's), or "heun", "ab2", "dpm" for fewer steps (`flowmo.solvers`); these change
                the picture.
            tail_merge: take the last so many steps as one, which changes the picture a little; None does not.
            plan: run the engine (see :meth:`decode_plan`); False runs the modules themselves, hooks and all.

        Raises:
            TypeError, ValueError: codes or noise of another dtype or shape, options out of range.
        """
        c = self.config
        if not isinstance(codes, Tensor) or not codes.is_floating_point():
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"codes: expected a float tensor of encode(), got {got}; for tokens call detokenize()")
        if codes.ndim != 3 or codes.shape[1:] != (c.latent_tokens, c.latent_channels):
            expected = f"[B, {c.latent_tokens}, {c.latent_channels}]"
            raise ValueError(f"codes: expected shape {expected}, got {list(codes.shape)}")
        shape = (codes.shape[0], 3, c.image_size, c.image_size)
        if generator is not None and not isinstance(generator, torch.Generator):
            got = type(generator).__name__
            raise TypeError(
                f"generator: expected a torch.Generator, got {got}; torch.Generator().manual_seed(0) is one"
            )
        if noise is None:
            source = generator.device if generator is not None else self.device
            noise = torch.randn(shape, generator=generator, device=source)
        elif not isinstance(noise, Tensor) or not noise.is_floating_point():
            got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"noise: expected a float tensor {list(shape)}, got {got}")
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise: expected shape {list(shape)}, got {list(noise.shape)}")
        if codes.shape[0] == 0:
            return torch.zeros(shape, device=self.device)
        codes = codes.to(self.device, self.dtype)
        noise = noise.to(self.device, torch.float32)
        schedule = self.schedule(steps, rho, guidance, guidance_interval, solver, tail_merge)
        if plan:
            with self.engine.lock:
                engine_plan = self.engine.decode_plan(self, codes.shape[0], schedule, Execution(self._precision()))
                return engine_plan.run(codes, noise)
        conditions = {True: self.condition(codes), False: self.condition(codes, keep=False)}

        def velocity(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
            return self.velocity(x.to(self.dtype), t, conditions[conditional])

        x = sample(velocity, patchify(noise, c.patch), **schedule._asdict())
        return unpatchify(x, c.patch, c.image_size).clamp_(-1, 1)

    def reconstruct(self, images: Tensor, **sampler: Any) -> Tensor:
        """decode(encode(images)): pictures [B, 3, S, S] in [-1, 1]; takes the options of :meth:`decode`."""
        return self.decode(self.encode(images), **sampler)

    # Plans: the same work with everything computed once that can be.

    def decode_plan(
        self,
        batch: int,
        steps: int | None = None,
        rho: float | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = (0.17, 1.02),
        *,
        solver: str = "euler",
        dtype: torch.dtype | None = None,
        graph: bool = True,
        tail_merge: int | None = None,
        cache: StepCache | None = None,
        fp8: bool = False,
        attention: str = "auto",
        overlap: bool = False,
        drop_modulation: bool = False,
    ) -> DecodePlan:
        """A sampler prepared for batches of up to `batch` pictures: `plan(codes, noise) -> images`.

        The modulation of all steps is one table, weights are cast once, guided steps run both passes as one batch, and
        on CUDA the whole sampler is one graph. :meth:`decode` uses such plans by itself, in the weights' dtype. In
        that dtype the picture is that of `decode(..., plan=False)` up to rounding; `tail_merge`, `cache`, `fp8`, other
        solvers than Euler and some attention backends change it (`flowmo.engine.psnr_to_exact` tells how much). Smaller
        batches run padded. Plans are kept by options, the last few of them, and follow changes of the weights.

        Args:
            steps, rho, guidance, guidance_interval, solver, tail_merge: as :meth:`decode`.
            dtype: of weights and activations; None is bf16 on CUDA and the weights' dtype elsewhere. The sampler's
                state stays in fp32.
            graph: capture one CUDA graph, now; without effect on other devices.
            cache: evaluations that run the first blocks alone, `StepCache(steps=(13, 15), blocks=4)` for example.
            fp8: qkv and both MLP layers of all blocks in row-scaled fp8 (compute capability 8.9 and newer; on a CPU in
                the slow reference arithmetic, to measure the error). Attention's projection, a twelfth of the linear
                work, stays in `dtype`, as do the input and output layers.
            attention: backend of `flowmo_kernels.joint_attention`; "fp8" and "int8" change the picture.
            overlap: on CUDA, the latent rows on a second stream beside the image rows; meant for batch 1.
            drop_modulation: free the decoder's modulation weights (a third of it). The model then decodes with this
                schedule only, and neither trains nor saves.

        Raises:
            ValueError: an option out of range, or fp8 where it cannot run.
            RuntimeError: the modulation weights were dropped for another schedule.
        """
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else self.dtype
        schedule = self.schedule(steps, rho, guidance, guidance_interval, solver, tail_merge)
        execution = Execution(dtype, graph, fp8, attention, overlap)
        with self.engine.lock:
            plan = self.engine.decode_plan(self, batch, schedule, execution, cache, drop_modulation)
            plan.capture()
        return plan

    def encode_plan(
        self,
        batch: int,
        *,
        dtype: torch.dtype | None = None,
        graph: bool = True,
        fp8: bool = False,
        attention: str = "auto",
        overlap: bool = False,
    ) -> EncodePlan:
        """An encoder prepared for up to `batch` pictures: `plan(images) -> codes`; options as :meth:`decode_plan`."""
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else self.dtype
        with self.engine.lock:
            plan = self.engine.encode_plan(self, batch, Execution(dtype, graph, fp8, attention, overlap))
            plan.capture()
        return plan

    def _precision(self) -> torch.dtype:
        """dtype of the transformers' arithmetic: autocast's where it is on, else the weights'."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype

    # Files.

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> FlowMo:
        """Load a released checkpoint (`.pth`), a folder of :meth:`save_pretrained`, or a training run.

        See :func:`flowmo.pretrained.load` for the options and the errors.
        """
        return pretrained.load(cls, path, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into a folder, each replaced atomically."""
        pretrained.save(self, folder)

    # Checks.

    def _check_images(self, images: Tensor) -> None:
        size = self.config.image_size
        expected = f"a float tensor [B, 3, {size}, {size}] with values in [-1, 1]"
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected {expected}, got {got}; convert uint8 by x / 127.5 - 1")
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images: expected {expected}, got shape {list(images.shape)}; "
                f"flowmo.data.resize_shorter and center_crop bring a photograph to {size} x {size}"
            )
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # values cannot be looked at while a CUDA graph is recorded
        if images.numel() and not bool((images.abs() <= 1.001).all()):
            low, high = float(images.min()), float(images.max())
            raise ValueError(
                f"images: expected {expected}, got values from {low:.4g} to {high:.4g}; scale [0, 255] by "
                "x / 127.5 - 1, [0, 1] by 2 x - 1"
            )

    def _check_discrete(self) -> None:
        if not self.config.discrete:
            raise ValueError(
                f"this model is continuous (quantizer {self.config.quantizer}) and has no tokens; use encode() and "
                "decode()"
            )


def _pair(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """The interval as a key of plans: configuration files give lists."""
    return None if interval is None else (float(interval[0]), float(interval[1]))
