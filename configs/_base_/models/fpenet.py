# FPENet's decoder (arXiv 1909.08599), 150 classes, on all four stages. A config adds `backbone` and
# `decode_head.in_channels`.
_base_ = "./upernet.py"

model = dict(
    decode_head=dict(
        _delete_=True,
        type="densezoo.MEUHead",
        in_index=[0, 1, 2, 3],
        channels=64,
        dropout_ratio=0.0,
        num_classes=150,
        align_corners=True,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)

# the decoder's batch norms count the images of all GPUs
sync_bn = "torch"
