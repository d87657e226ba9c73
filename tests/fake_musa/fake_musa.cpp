// A torch device that behaves like an accelerator and computes on the CPU.
//
// Its tensors live in CPU memory but are not CPU tensors: torch dispatches their operators here. Most go to the CPU
// kernels through torch's own fallback, which copies; so results are those of the CPU. What a real accelerator refuses is
// refused too: an operator over tensors of this device and of the CPU together is an error.
//
// torch_musa.py names the device `musa` and gives it a Python module.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution_overrideable.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <set>
#include <string>

namespace {

using at::Scalar;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using c10::SymInt;
using c10::SymIntArrayRef;
using std::optional;

constexpr auto MUSA = c10::DeviceType::PrivateUse1;

// -- devices ---------------------------------------------------------------------------------------------------------

thread_local DeviceIndex current_device = 0;

DeviceIndex device_count() {
  const char* count = std::getenv("FAKE_MUSA_DEVICES");
  return count ? static_cast<DeviceIndex>(std::atoi(count)) : 1;
}

// Streams and events are empty: every kernel has finished when its call returns.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return MUSA; }
  Device getDevice() const override { return Device(MUSA, current_device); }
  Device exchangeDevice(Device device) const override {
    auto previous = getDevice();
    setDevice(device);
    return previous;
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "musa:", int(device.index()), " does not exist");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// -- memory ----------------------------------------------------------------------------------------------------------

std::atomic<int64_t> bytes_held{0}, bytes_peak{0};

int64_t memory_limit() {
  const char* limit = std::getenv("FAKE_MUSA_BYTES");
  return limit ? std::atoll(limit) : int64_t(1) << 62;
}

void free_block(void* block) {
  auto start = static_cast<int64_t*>(block);
  bytes_held -= *start;
  c10::free_cpu(start);
}

// Each block begins with its size, 64 bytes before the data, so that alignment stays what CPU kernels expect.
struct Allocator final : c10::Allocator {
  static constexpr size_t kHeader = 64;
  c10::DataPtr allocate(size_t bytes) override {
    auto held = (bytes_held += bytes);
    if (held > memory_limit()) {
      bytes_held -= bytes;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "MUSA out of memory: tried to allocate ", bytes, " bytes");
    }
    if (held > bytes_peak) bytes_peak = held;
    auto block = static_cast<char*>(c10::alloc_cpu(bytes + kHeader));
    *reinterpret_cast<int64_t*>(block) = bytes;
    return {block + kHeader, block, &free_block, Device(MUSA, current_device)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(MUSA, &allocator);

// Random numbers come from the CPU's generator: a dropout mask is the same on both devices.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void init() const override {}
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  Device getDeviceFromPtr(void*) const override { return Device(MUSA, current_device); }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
};
const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// -- tensors: the few operators that every backend must have ---------------------------------------------------------

c10::DispatchKeySet keys() { return c10::DispatchKeySet(c10::DispatchKey::PrivateUse1); }

Tensor empty(SymIntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<Device> device,
             optional<bool>, optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, keys(), c10::dtype_or_default(dtype),
                                   format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<Device> device, optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           keys(), c10::dtype_or_default(dtype));
}

// The same memory seen as a CPU tensor.
Tensor on_cpu(const Tensor& x) {
  if (x.device().type() != MUSA) return x;
  auto data = const_cast<void*>(x.const_data_ptr());
  return at::from_blob(data, x.sizes(), x.strides(), [x](void*) {}, x.options().device(at::kCPU));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Scalar local_scalar_dense(const Tensor& x) { return on_cpu(x).item(); }

optional<int64_t> as_int(optional<SymInt> number) {
  return number ? optional<int64_t>(number->guard_int(__FILE__, __LINE__)) : std::nullopt;
}

Tensor as_strided(const Tensor& x, SymIntArrayRef size, SymIntArrayRef stride, optional<SymInt> offset) {
  return at::native::as_strided_tensorimpl(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           as_int(offset));
}

Tensor view(const Tensor& x, SymIntArrayRef size) { return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& x, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set(Tensor& x, c10::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return x;
}

Tensor& set_from_part(Tensor& x, c10::Storage storage, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  return set(x, storage, *as_int(offset), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_from_storage(Tensor& x, c10::Storage storage) {
  const int64_t numel = storage.nbytes() / x.itemsize();
  return set(x, storage, 0, {numel}, {1});
}

Tensor& set_from_tensor(Tensor& x, const Tensor& source) {
  return set(x, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

void record_stream(Tensor&, Stream) {}

// Contents are not kept: enough for `out=` arguments, which are what resizes.
const Tensor& resize(const Tensor& x, SymIntArrayRef size, optional<at::MemoryFormat>) {
  auto fresh = at::empty(C10_AS_INTARRAYREF_SLOW(size), x.options());
  set(const_cast<Tensor&>(x), fresh.storage(), 0, fresh.sizes(), fresh.strides());
  return x;
}

// -- all other operators: the CPU's kernels --------------------------------------------------------------------------

std::atomic<int64_t> kernels{0};

// Operators that take indices, lengths or sizes from the CPU on real devices too.
bool may_mix(const std::string& name) {
  static const std::set<std::string> names{"aten::index", "aten::index_put", "aten::index_put_",
                                           "aten::_index_put_impl_"};
  return names.count(name) || name.find("ctc") != std::string::npos || name.find("pack") != std::string::npos;
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++kernels;
  const auto& name = op.schema().name();
  std::set<std::string> devices;  // 0-dim CPU tensors count as numbers
  auto note = [&](const Tensor& x) {
    if (x.defined() && (x.device().type() == MUSA || x.dim() > 0)) devices.insert(x.device().str());
  };
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) {
      note(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& x : value.toTensorVector()) note(x);
    }
  }
  TORCH_CHECK(devices.size() < 2 || may_mix(name), "Expected all tensors to be on the same device, but found ",
              *devices.begin(), " and ", *devices.rbegin(), " in ", name);
  at::native::cpu_fallback(op, stack);
}

Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                   SymInt groups) {
  ++kernels;
  optional<Tensor> cpu_bias;
  if (bias && bias->defined()) cpu_bias = on_cpu(*bias);
  return at::convolution_symint(on_cpu(x), on_cpu(weight), cpu_bias, stride, padding, dilation, transposed,
                                output_padding, groups)
      .to(x.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        SymIntArrayRef stride, SymIntArrayRef padding,
                                                        SymIntArrayRef dilation, bool transposed,
                                                        SymIntArrayRef output_padding, SymInt groups,
                                                        std::array<bool, 3> wanted) {
  ++kernels;
  std::vector<SymInt> bias_size{weight.sym_size(transposed ? 1 : 0) * (transposed ? groups : SymInt(1))};
  auto [dx, dweight, dbias] =
      at::convolution_backward_symint(on_cpu(grad), on_cpu(x), on_cpu(weight), SymIntArrayRef(bias_size), stride,
                                      padding, dilation, transposed, output_padding, groups, wanted);
  auto back = [&](const Tensor& y) { return y.defined() ? y.to(x.device()) : y; };
  return {back(dx), back(dweight), back(dbias)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize);
  m.impl("record_stream", record_stream);
  m.impl("set_.source_Storage_storage_offset", set_from_part);
  m.impl("set_.source_Storage", set_from_storage);
  m.impl("set_.source_Tensor", set_from_tensor);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

// -- mixed precision -------------------------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv1d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
}

}  // namespace

// -- what torch_musa.py asks for -------------------------------------------------------------------------------------

TORCH_LIBRARY(fake_musa, m) {
  m.def("current_device() -> int", []() -> int64_t { return current_device; });
  m.def("set_device(int index) -> ()", [](int64_t index) { Guard().setDevice(Device(MUSA, DeviceIndex(index))); });
  m.def("device_count() -> int", []() -> int64_t { return device_count(); });
  m.def("bytes_held() -> int", []() -> int64_t { return bytes_held; });
  m.def("bytes_peak() -> int", []() -> int64_t { return bytes_peak; });
  m.def("reset_peak() -> ()", [] { bytes_peak = bytes_held.load(); });
  m.def("kernels() -> int", []() -> int64_t { return kernels; });
}
