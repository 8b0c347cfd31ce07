# P2AT's decoder (arXiv 2310.15025), 150 classes, on all four stages, with the published losses: of the hardest pixels,
# 0.4 of them for the auxiliary predictions. A config adds `backbone` and `decode_head.in_channels`.
_base_ = "./upernet.py"

model = dict(
    decode_head=dict(
        _delete_=True,
        type="densezoo.P2ATHead",
        in_index=[0, 1, 2, 3],
        channels=64,
        num_classes=150,
        align_corners=True,
        # 131072 pixels of four images are published
        sampler=dict(type="OHEMPixelSampler", thresh=0.9, min_kept=32768),
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)

# the decoder's batch norms count the images of all GPUs
sync_bn = "torch"
