// Samples one image from a package that compile.py wrote, without Python. UniPC of second order (arXiv 2302.04867), as
// in lamamba sample; for pixels and flow matching. examples/onnx_sampling.py also shows noise prediction.
//
//   torch=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O1 -I$torch/include -I$torch/include/torch/csrc/api/include examples/aoti/sample.cpp -o sample
//       -L$torch/lib -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$torch/lib                   (all on one line)
//   ./sample exported/package.pt2 1 32 32 9 sample.pgm                                 # channels, height, width, label
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cmath>
#include <fstream>
#include <iostream>
#include <vector>

constexpr int kTimesteps = 1000, kSteps = 25;
constexpr double kGuidance = 2.0;

double log_signal_to_noise(float share) { return std::log((1 - share) / share); }

// Takes step i by the predictor or, given the clean image predicted after the step, by the corrector. `shares` are the
// shares of noise before each step, `before` and `image` the clean images predicted before steps i - 1 and i.
torch::Tensor take_step(const torch::Tensor& x, int i, const std::vector<float>& shares, const torch::Tensor& before,
                   const torch::Tensor& image, const torch::Tensor& after = {}) {
  const double share = shares[i], next = shares[i + 1];
  const double length = log_signal_to_noise(shares[i + 1]) - log_signal_to_noise(shares[i]);
  const double growth = std::expm1(-length);
  auto extrapolated = image;
  if (!before.defined()) {
    if (after.defined()) extrapolated = (image + after) / 2;
  } else {
    const double ratio = length / (log_signal_to_noise(shares[i]) - log_signal_to_noise(shares[i - 1]));
    double weight = 0.5;
    if (after.defined()) {
      const double first = (growth / -length - 1) / growth;
      const double second = 2 * ((growth / -length - 1) / -length - 0.5) / growth;
      weight = (first - second) / (1 + 1 / ratio);
      extrapolated = image + (first - weight) * (after - image);
    }
    extrapolated = extrapolated + weight * ratio * (image - before);
  }
  return next / share * x - (1 - next) * growth * extrapolated;
}

int main(int argc, char** argv) {
  if (argc != 7) {
    std::cerr << "usage: sample PACKAGE CHANNELS HEIGHT WIDTH LABEL OUT.pgm\n";
    return 2;
  }
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader network(argv[1]);
  const int64_t channels = std::stoll(argv[2]), height = std::stoll(argv[3]), width = std::stoll(argv[4]);
  const auto label = torch::full({1}, std::stoll(argv[5]), torch::kLong);
  const auto guidance = torch::tensor(kGuidance, torch::kFloat);

  std::vector<float> shares{1 - 1e-6f};  // of noise; a signal of 0 has no logarithm
  for (int i = 1; i < kSteps; i++) shares.push_back(1 - 0.999 * i / kSteps);
  shares.push_back(0);

  torch::manual_seed(0);
  auto x = torch::randn({1, channels, height, width});  // the noise of lamamba sample --seed 0
  torch::Tensor start, before, last, image;  // start: the corrected x before the step that led to x
  for (int i = 0; i < kSteps; i++) {
    const auto t = torch::full({1}, shares[i] * kTimesteps, torch::kFloat);
    const auto velocity = network.run({x, t, label, guidance})[0].slice(1, 0, channels);
    image = (x - shares[i] * velocity).clamp(-1, 1);
    if (i == kSteps - 1) break;
    start = i ? take_step(start, i - 1, shares, before, last, image) : x;
    x = take_step(start, i, shares, last, image);
    before = last;
    last = image;
  }
  const auto pixels = ((image[0] + 1) * 127.5).round().to(torch::kByte).permute({1, 2, 0}).contiguous();
  std::ofstream out(argv[6], std::ios::binary);
  out << (channels == 1 ? "P5 " : "P6 ") << width << " " << height << " 255\n";
  out.write(reinterpret_cast<const char*>(pixels.data_ptr<uint8_t>()), pixels.numel());
}
