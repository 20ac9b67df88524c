"""The main job, end to end, on real data: constrain, train, save, reload, certify."""

from hf_lipschitz.demo.acts import Act, run_act, text_act, vision_act


__all__ = ["Act", "run_act", "text_act", "vision_act"]
