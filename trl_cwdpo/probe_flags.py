"""The flags that probes raise, in words: what each means, and what to change."""

MEANINGS = {
    "displacement": "the chosen responses lose probability although the margin grows",
    "squeezing": "probability gathers on what the model would say anyway",
    "miscalibration": "the model has become surer than it is right",
    "drift": "the model has moved far from its reference",
    "saturation": "nearly all pairs are learned; further steps push without need",
    "cooled_out": "the rejected responses have become so unlikely that they teach nothing",
}
ADVICE = {
    "displacement": "Lower `learning_rate`, add an NLL term (`loss_type=['sigmoid', 'sft']`) or set "
    "`cooling_mode='gate'`.",
    "squeezing": "Lower `learning_rate` or `cooling_temperature`, set `cooling_mode='gate'` or add an NLL term.",
    "miscalibration": "Train for fewer steps, lower `learning_rate` or raise `beta`.",
    "drift": "Raise `beta` or lower `learning_rate`.",
    "saturation": "Stop here, or take harder negatives.",
    "cooled_out": "Take fresh negatives (`dataset_negative_fraction` below 1), or lower `cooling_floor`.",
}
