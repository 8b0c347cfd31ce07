# A timm model as classifier of 1000 classes, trained with cross-entropy alone. A config adds `model_name`.
_base_ = "./timm_classifier.py"

model = dict(loss=dict(_delete_=True, type="CrossEntropyLoss"), train_cfg=dict(_delete_=True))
