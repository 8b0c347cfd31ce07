# DeepLabV3+ (arXiv 1802.02611), 150 classes, with an auxiliary head on the third stage. A config adds `backbone`, the
# heads' `in_channels`, `c1_in_channels` and, as the last stage's stride asks for, `dilations`.
_base_ = "./upernet.py"

model = dict(
    decode_head=dict(
        _delete_=True,
        type="DepthwiseSeparableASPPHead",
        in_index=3,
        channels=512,
        c1_channels=48,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    )
)
