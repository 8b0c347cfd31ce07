_base_ = "./maxvit-tiny-tf-512_in1k.py"

# drop path as at 224, as the published fine-tuning of the tiny model has it
model = dict(model_name="densezoo_maxvit_small_tf_512", drop_path_rate=0.3)
load_from = "https://huggingface.co/timm/maxvit_small_tf_224.in1k/resolve/main/model.safetensors"
