// The entry points of a package on its mapped weights, with a cache for one conversation. Tokens in, logits out.
#pragma once
#include <ATen/ops/from_blob.h>
#include <ATen/ops/from_file.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <filesystem>
#include "package.h"

struct Model {
  const size_t max_seq_len, chunk, slots;
  explicit Model(const Package& package)
      : max_seq_len(package.number("cache", 2)), chunk(package.number("prefill_chunk")), slots(package.number("cache")),
        file_(at::from_file(package.path, false, std::filesystem::file_size(package.path), at::kByte)) {
    for (const Words& words : package.all("library")) load_ops(package.read("extra/native/" + words.at(0)));
    const size_t begin = package.archive->getRecordOffset("extra/model/model.safetensors");
    for (const Words& words : package.all("weight")) {  // name, dtype, offset, bytes, shape
      char* data = static_cast<char*>(file_.data_ptr()) + begin + std::stol(words.at(2));
      const at::Tensor weight = at::from_blob(data, shape_of({words.begin() + 4, words.end()}), dtype_of(words[1]));
      // The code reads the widest registers, and takes weights to lie where their size divides.
      shared_.push_back(reinterpret_cast<uintptr_t>(data) % 64 == 0 ? weight : weight.clone());
    }
    for (long i = 0; i < 2 * package.number("layers"); ++i)
      shared_.push_back(at::zeros(shape_of(package.one("cache")), dtype_of(package.one("dtype").at(0))));
    for (const Words& words : package.all("frequencies")) {  // how many, then each
      std::vector<float> values;
      for (size_t i = 1; i < words.size(); ++i) values.push_back(std::stof(words[i]));
      shared_.push_back(at::tensor(values));
    }
    prefill_ = std::make_unique<Program>(package.path, "prefill", true);
    decode_ = std::make_unique<Program>(package.path, "decode", true);
  }

  // Reads tokens from a position on; those before it were read. The logits of the token that follows.
  std::vector<float> read(const std::vector<int>& tokens, size_t from) {
    const c10::InferenceMode guard;
    at::Tensor logits;
    for (int64_t start = from, count; size_t(start) < tokens.size(); start += count) {
      count = std::min(chunk, tokens.size() - start);
      const std::vector<int64_t> part(tokens.begin() + start, tokens.begin() + start + count);
      std::vector<at::Tensor> inputs = shared_;
      const auto all = [](int64_t many, int64_t value) { return at::zeros({many}, at::kLong).add(value); };
      if (count > 1)  // tokens, the first's position, slot, the last's place, context
        inputs.insert(inputs.end(), {at::tensor(part).unsqueeze(0), all(1, start), all(1, 0), all(1, count - 1),
                                     at::tensor(start + count)});
      else  // of every slot token, position and advance; not to take the likeliest token; slot
        inputs.insert(inputs.end(), {all(slots, part[0]), all(slots, start), all(slots, 0), all(1, 0), all(1, 0)});
      logits = (count > 1 ? prefill_ : decode_)->run(inputs).at(0);
    }
    return {logits.const_data_ptr<float>(), logits.const_data_ptr<float>() + logits.numel()};
  }

 private:
  using Program = torch::inductor::AOTIModelPackageLoader;

  static std::vector<int64_t> shape_of(const Words& words) {
    std::vector<int64_t> shape;
    for (const std::string& word : words) shape.push_back(std::stol(word));
    return shape;
  }
  static at::ScalarType dtype_of(const std::string& name) {
    return std::map<std::string, at::ScalarType>{
        {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"int8", at::kChar},
        {"uint8", at::kByte},    {"float8_e4m3fn", at::kFloat8_e4m3fn}}.at(name);
  }
  static void load_ops(const std::string& library) {  // those that it registers
    const std::string file = "/proc/self/fd/" + std::to_string(memfd_create("ops", 0));
    std::ofstream(file, std::ios::binary) << library;
    if (!dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL)) throw Refusal(dlerror());
  }

  const at::Tensor file_;           // mapped: what is not used is not read
  std::vector<at::Tensor> shared_;  // weights, keys, values, frequencies: what every entry point takes first
  std::unique_ptr<Program> prefill_, decode_;
};
