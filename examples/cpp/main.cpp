// Prints the ten logits of an exported fashion-cnn or fashion-mlp for an image, one per line.
//
//   predict MODEL IMAGE
//
// MODEL is a file written by `python -m studies.export RUN_ID --to torchscript` (.pt) or
// `--to aoti` (.pt2); IMAGE is a binary .pgm of 28 x 28 grey pixels.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int kSide = 28;

// Returns the image as the networks take it: (1, 1, 28, 28), floats from 0 to 1.
torch::Tensor read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("the image " + path + " cannot be opened");

  const auto next = [&file] {  // the next field of the header, skipping comments
    std::string word;
    while (file >> word && word.front() == '#') std::getline(file, word);
    return word;
  };
  const std::string side = std::to_string(kSide);
  if (next() != "P5" || next() != side || next() != side || next() != "255") {
    throw std::runtime_error("the image " + path + " must be a binary .pgm (P5) of " + side +
                             " x " + side + " pixels from 0 to 255");
  }
  file.get();  // the byte between the header and the pixels
  std::vector<std::uint8_t> pixels(kSide * kSide);
  if (!file.read(reinterpret_cast<char*>(pixels.data()), kSide * kSide)) {
    throw std::runtime_error("the image " + path + " is truncated");
  }
  // Division, not multiplication by 1 / 255, gives the same floats as torchvision's ToTensor.
  return torch::from_blob(pixels.data(), {1, 1, kSide, kSide}, torch::kUInt8)
      .to(torch::kFloat32)
      .div(255);
}

torch::Tensor predict(const std::string& path, const torch::Tensor& image) {
  if (!std::ifstream(path)) throw std::runtime_error("the model " + path + " cannot be opened");
  if (path.ends_with(".pt2")) {
    return torch::inductor::AOTIModelPackageLoader(path).run({image}).at(0);
  }
  return torch::jit::load(path).forward({image}).toTensor();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: predict MODEL IMAGE\n";
    return 2;
  }
  try {
    const torch::InferenceMode without_gradients;
    const torch::Tensor logits = predict(argv[1], read_image(argv[2])).flatten().contiguous();
    for (std::int64_t i = 0; i < logits.numel(); ++i) {
      std::printf("%.9g\n", logits.const_data_ptr<float>()[i]);
    }
  } catch (const std::exception& error) {
    const std::string message = error.what();  // torch appends a stack trace
    std::cerr << "predict: " << message.substr(0, message.find('\n')) << '\n';
    return 1;
  }
  return 0;
}
