"""The README's example: adapt a pretrained network, look at what was done, train it, measure it."""

import tinytl
from tinytl.data import EvalTransform, TrainTransform

backbone = tinytl.load("efficientnet_lite0", num_classes=2)  # ImageNet weights, a fresh classifier
done = tinytl.adapt_(backbone.model, tinytl.TINYTL_LB, resolution=96)  # in place
print(done)

p = backbone.preprocessing
train, held_out = tinytl.resolve_split("elpv")  # or a folder ROOT/CLASS/*.jpg
batches = tinytl.Loader(train, TrainTransform(96, p.mean, p.std), batch_size=8, shuffle=True)
tinytl.calibrate_(backbone.model, done, [next(batches.epoch(0)).normalized()])  # statistics for what was inserted
tinytl.fit(backbone.model, batches, None, tinytl.FitOptions(epochs=1, lr=3e-3, micro_batch=4))
print(tinytl.evaluate(backbone.model, tinytl.Loader(held_out, EvalTransform(96, p.mean, p.std), 8, shuffle=False)))
